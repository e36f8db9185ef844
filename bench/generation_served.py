"""Generation as clients see it: `shoal serve` on a GPT-2-shaped folder of 22M parameters, 16 clients that stream.

Every client asks /v1/completions for 64 tokens after a prompt of 32, again and again, greedily; one in so many prompts
is long. Counted: tokens a second, CPU time of all server processes a token, time to the first token, gaps between
tokens. The clients are those of `shoal bench serve`. Where there are two cores, the model process is held to the first
and HTTP and the clients to the second: gaps between tokens are then the engine's, not those of who shares its core.

    python bench/generation_served.py [--seconds 15] [--quick]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from process_trees import below, cpu_s
from tokenizers import Tokenizer, models, pre_tokenizers

from shoal.models.gpt import GPT, GPTConfig
from shoal.models.huggingface import save_folder
from shoal.serve.load.figures import figures, percentiles
from shoal.serve.load.processes import Asked, send

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW, STREAMS = 32, 64, 16
BODIES = 512  # prompts, in turns: what comes again has left the cache
WARM_S = 2.0
OTHERS = min(1, len(os.sched_getaffinity(0)) - 1)  # the core of HTTP and the clients; the model has core 0


def save_model(folder: Path, quick: bool) -> None:
    torch.manual_seed(0)
    layers, heads, width, vocab = (2, 2, 64, 1000) if quick else (6, 6, 384, 30522)
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    config = GPTConfig(layers=layers, heads=heads, width=width, vocab=vocab, context=1024, activation="gelu_tanh")
    save_folder(GPT(config).eval(), folder, backend.to_str())


def bodies_of(vocab: int, long: int, every: int) -> list[str]:
    """What clients ask in turns, one in ``every`` with a prompt of ``long`` tokens; 0: none."""
    random = np.random.default_rng(0)
    asked = {"max_tokens": NEW, "temperature": 0, "stream": True, "ignore_eos": True}
    return [
        json.dumps({"prompt": random.integers(0, vocab, length).tolist(), **asked})
        for number in range(1, BODIES + 1)
        for length in [long if every and number % every == 0 else PROMPT]
    ]


def load(port: int, pid: int, vocab: int, streams: int, seconds: float, long: int, every: int) -> dict:
    """The clients of `shoal bench serve`, in a closed loop; CPU time is that of all processes of the server."""
    bodies = bodies_of(vocab, long, every)
    used: dict[int, float] = {}

    def watch() -> None:
        time.sleep(WARM_S)
        before = {each: cpu_s(each) for each in (pid, *below(pid))}
        time.sleep(seconds)
        used.update({each: cpu_s(each) - began for each, began in before.items()})

    asked = Asked("127.0.0.1", port, "/v1/completions", bodies)
    beside = ["taskset", "-c", str(OTHERS)] if OTHERS else []
    seen = send(asked, seconds=WARM_S + seconds, clients=streams, connections=streams, before=beside, meanwhile=watch)
    assert {sample.status for sample in seen.samples} == {200}
    found = figures(seen, WARM_S, seconds, open_loop=False)
    first: dict[str, list[float]] = {"short": [], "long": []}
    for sample in seen.samples:
        if sample.end > WARM_S:
            is_long = bool(every) and (sample.body + 1) % every == 0
            first["long" if is_long else "short"].append(sample.first - sample.due)
    tokens = found["tokens_a_second"] * seconds
    return {
        "streams": streams,
        "long_prompt": long,
        "one_in": every,
        "tokens_a_second": found["tokens_a_second"],
        "cpu_ms_a_token": 1e3 * sum(used.values()) / tokens,
        "cpu_ms_a_token_by_process": [1e3 * seconds / tokens for seconds in used.values()],
        "first_ms": {kind: {"count": len(times), **percentiles(times)} for kind, times in first.items() if times},
        "gap_ms": found["gap_ms"],
        "gap_p99_over_p50": found["gap_ms"]["p99"] / found["gap_ms"]["p50"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs; saves nothing")
    args = parser.parse_args()
    vocab = 1000 if args.quick else 30522
    out: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "gpt", args.quick)
        for dtype in ("float32", "bfloat16"):
            command = [
                sys.executable,
                "-m",
                "shoal",
                "serve",
                f"{folder}/gpt",
                "--port",
                "0",
                "--json",
                "--dtype",
                dtype,
            ]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert server.stdout
            try:
                told = json.loads(server.stdout.readline())
                port = int(told["url"].rpartition(":")[2])
                os.sched_setaffinity(server.pid, {OTHERS})
                for each in below(server.pid):
                    os.sched_setaffinity(each, {0})
                cases = {
                    "16 streams": (STREAMS, 0, 0),
                    "1 stream": (1, 0, 0),
                    "16 streams, 512 in 8": (STREAMS, 512, 8),
                }
                for name, (streams, long, every) in cases.items():
                    seconds = 2.0 if args.quick else args.seconds
                    found = load(port, server.pid, vocab, streams, seconds, long, every)
                    out["runs"][f"{dtype}, {name}"] = found
                    first = {kind: f"{t['p50']:.0f}/{t['p99']:.0f}" for kind, t in found["first_ms"].items()}
                    parts = ", ".join(f"{ms:.2f}" for ms in found["cpu_ms_a_token_by_process"])
                    print(
                        f"{dtype}, {name}: {found['tokens_a_second']:.0f} tokens/s, CPU ms a token "
                        f"{found['cpu_ms_a_token']:.2f} ({parts}); first token p50/p99 {first} ms; "
                        f"gap {found['gap_ms']['p50']:.1f}/{found['gap_ms']['p99']:.1f} ms, "
                        f"ratio {found['gap_p99_over_p50']:.2f}",
                        flush=True,
                    )
            finally:
                server.terminate()
                server.wait(60)
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "generation_served.json").write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
