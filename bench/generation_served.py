"""Generation as clients see it: `shoal serve` on a GPT-2-shaped folder of 22M parameters, 16 clients that stream.

Every client asks /v1/completions for 64 tokens after a prompt of 32, again and again, greedily; one in so many prompts
is long. Counted: tokens a second, CPU time of all server processes a token, time to the first token, gaps between
tokens. The client shares the machine's cores with the server.

    python bench/generation_served.py [--seconds 15] [--quick]
"""

import argparse
import asyncio
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

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW, STREAMS = 32, 64, 16


def save_model(folder: Path, quick: bool) -> None:
    torch.manual_seed(0)
    layers, heads, width, vocab = (2, 2, 64, 1000) if quick else (6, 6, 384, 30522)
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    config = GPTConfig(layers=layers, heads=heads, width=width, vocab=vocab, context=1024, activation="gelu_tanh")
    save_folder(GPT(config).eval(), folder, backend.to_str())


class Client:
    """One connection that is kept, and times of what comes."""

    def __init__(self, port: int, number: int, vocab: int, long: int, every: int, end: list[float]) -> None:
        self.port, self.number, self.vocab, self.long, self.every, self.end = port, number, vocab, long, every, end
        self.first: dict[str, list[float]] = {"short": [], "long": []}
        self.gaps: list[float] = []
        self.tokens = 0
        self.random = np.random.default_rng(number)

    async def run(self) -> None:
        await asyncio.sleep(0.05 * self.number)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        asked = self.number
        while time.perf_counter() < self.end[0]:
            asked += 1
            is_long = bool(self.every) and asked % self.every == 0
            prompt = self.random.integers(0, self.vocab, self.long if is_long else PROMPT).tolist()
            body = json.dumps(
                {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True, "ignore_eos": True}
            ).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            await self._answer(reader, "long" if is_long else "short")
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, kind: str) -> None:
        begun, last = time.perf_counter(), 0.0
        while True:
            line = await reader.readline()
            if not line.startswith(b"data: "):
                assert line, "the server has closed the connection"
                assert not line.startswith(b"HTTP/1.1") or b" 200 " in line, line
                continue
            if line.startswith(b"data: [DONE]"):
                while (await reader.readline()).strip() != b"0":
                    pass
                await reader.readline()
                return
            now = time.perf_counter()
            self.tokens += 1
            if last:
                self.gaps.append(now - last)
            else:
                self.first[kind].append(now - begun)
            last = now


def percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(times, p) * 1e3) for p in (50, 99)} | {"count": len(times)}


async def load(port: int, pid: int, vocab: int, streams: int, seconds: float, long: int, every: int) -> dict:
    end = [time.perf_counter() + seconds + 1.0]
    clients = [Client(port, number, vocab, long, every, end) for number in range(streams)]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    await asyncio.sleep(1.0)  # until all have begun
    pids = [pid, *below(pid)]
    before, tokens, begun = {pid: cpu_s(pid) for pid in pids}, sum(c.tokens for c in clients), time.perf_counter()
    await asyncio.sleep(seconds)
    tokens, spent = sum(c.tokens for c in clients) - tokens, time.perf_counter() - begun
    after = {pid: cpu_s(pid) for pid in pids}
    await asyncio.gather(*tasks)
    first = {kind: [t for c in clients for t in c.first[kind]] for kind in ("short", "long")}
    gaps = [gap for c in clients for gap in c.gaps]
    used = {pid: after[pid] - before[pid] for pid in pids}
    return {
        "streams": streams,
        "long_prompt": long,
        "one_in": every,
        "tokens_a_second": tokens / spent,
        "cpu_ms_a_token": 1e3 * sum(used.values()) / tokens,
        "cpu_ms_a_token_by_process": [1e3 * seconds / tokens for seconds in used.values()],
        "first_ms": {kind: percentiles(times) for kind, times in first.items() if times},
        "gap_ms": percentiles(gaps),
        "gap_p99_over_p50": float(np.percentile(gaps, 99) / np.percentile(gaps, 50)),
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
                cases = {
                    "16 streams": (STREAMS, 0, 0),
                    "1 stream": (1, 0, 0),
                    "16 streams, 512 in 8": (STREAMS, 512, 8),
                }
                for name, (streams, long, every) in cases.items():
                    asyncio.run(load(port, server.pid, vocab, streams, 1.0, long, every))  # warm
                    seconds = 2.0 if args.quick else args.seconds
                    found = asyncio.run(load(port, server.pid, vocab, streams, seconds, long, every))
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
