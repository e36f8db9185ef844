"""Generation against a tight loop over the same kernels, and against a loop of plain PyTorch, in turns in one process.

The model has GPT-2's shape, 22M parameters: 6 layers, 6 heads, width 384, a vocabulary of 30,522. Greedy, 64 new
tokens. `engine` is the whole engine behind the seam of shoal/serve/engine.py: scheduling, paged cache, choosing tokens,
messages encoded. `tight` calls the same C++ step with tables that never change and takes the argmax. `torch` keeps keys
and values in one tensor a layer, as fast as plain PyTorch lets it.

Latencies are in CPU seconds of the one thread that does all the work: what they would be on a core of its own.
`generation_served.py` has those of real clients by the clock on the wall.

    python bench/generation.py [--quick]
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from turns import turns

from shoal.models.gpt import GPT, GPTConfig
from shoal.serve.engine import Failed, Item, Request, Result
from shoal.serve.generation.engine import open_engine
from shoal.serve.generation.messages import Ask
from shoal.serve.generation.native_step import NativeStep, available
from shoal.serve.generation.opening import open_step
from shoal.serve.generation.options import Options
from shoal.serve.generation.step import BLOCK, Rows

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW, CONTEXT = 32, 64, 1024
CACHE = 64 << 20  # bytes: twice what 16 streams need


def model_of(quick: bool) -> GPT:
    torch.manual_seed(0)
    sizes = (2, 2, 64, 1000) if quick else (6, 6, 384, 30522)
    layers, heads, width, vocab = sizes
    config = GPTConfig(layers=layers, heads=heads, width=width, vocab=vocab, context=CONTEXT, activation="gelu_tanh")
    return GPT(config).eval().requires_grad_(False)


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    return torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


class EngineArm:
    """The engine, asked as the HTTP side asks it."""

    def __init__(self, model: GPT, **options) -> None:
        self.messages: list = []
        self.engine = open_engine(model, {}, {"threads": 1, "generation": options}, self._tell)
        self.encoder = msgspec.msgpack.Encoder()
        self.id = 0

    def _tell(self, messages) -> None:
        self.encoder.encode(list(messages))  # what goes through the socket
        self.messages.append((time.thread_time(), messages))

    def ask(self, tokens: list[int], new: int = NEW, **options) -> int:
        self.id += 1
        payload = msgspec.Raw(msgspec.msgpack.encode(Ask(tokens, new, temperature=0, **options)))
        self.engine.add(Request(self.id, "generate", payload, len(tokens) + new, time.monotonic(), 1e12))
        return self.id

    def step(self) -> bool:
        due = self.engine.next_at(time.monotonic())
        if due is None:
            return False
        self.engine.work(due)
        return True

    def __call__(self, asked: list[list[int]]) -> list[list[int]]:
        self.messages.clear()
        ids = [self.ask(tokens) for tokens in asked]
        while self.step():
            pass
        return [self.tokens(id) for id in ids]

    def tokens(self, id: int) -> list[int]:
        found = [m for _, messages in self.messages for m in messages if isinstance(m, Item) and m.id == id]
        return [token for item in found for piece in msgspec.msgpack.decode(item.payload) for token in piece[1]]


class TightArm:
    """The same kernels with nothing around them."""

    def __init__(self, model: GPT, count: int, half: bool = False) -> None:
        blocks = -(-(PROMPT + NEW) // BLOCK)
        self.step = NativeStep(model, count * blocks, half=half)
        self.tables = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)

    def __call__(self, asked: list[list[int]]) -> list[list[int]]:
        count = len(asked)
        every = np.arange(count)
        rows = Rows(
            np.array(asked, np.int64).reshape(-1),
            np.tile(np.arange(PROMPT), count),
            np.repeat(every, PROMPT),
            self.tables,
            every * PROMPT + PROMPT - 1,
        )
        tokens = self.step.run(rows).argmax(axis=1)
        out = [tokens]
        places = np.full(count, PROMPT)
        for _ in range(NEW - 1):
            tokens = self.step.run(Rows(tokens, places, every, self.tables, every)).argmax(axis=1)
            places += 1
            out.append(tokens)
        return np.stack(out, 1).tolist()


class TorchArm:
    """Plain PyTorch with a static cache: every step one batch of all streams."""

    def __init__(self, model: GPT, count: int) -> None:
        config = model.config
        size = (count, config.heads, PROMPT + NEW, config.width // config.heads)
        self.model = model
        self.cache = [(torch.zeros(size), torch.zeros(size)) for _ in model.blocks]

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        model, end = self.model, start + tokens.shape[1]
        x = model.tokens(tokens) + model.positions.weight[start:end]
        for block, (keys, values) in zip(model.blocks, self.cache, strict=True):
            attention = block.attention
            q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, -1, attention.head_size)).permute(2, 0, 3, 1, 4)
            keys[:, :, start:end], values[:, :, start:end] = k, v
            mixed = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], is_causal=start == 0)
            x = x + attention.out(mixed.transpose(1, 2).flatten(2))
            x = x + block.down(block.activation(block.up(block.norm2(x))))
        return F.linear(model.norm(x[:, -1]), model.tokens.weight).argmax(-1)

    def __call__(self, asked: list[list[int]]) -> list[list[int]]:
        tokens = self.forward(torch.tensor(asked), 0)
        out = [tokens]
        for step in range(NEW - 1):
            tokens = self.forward(tokens[:, None], PROMPT + step)
            out.append(tokens)
        return torch.stack(out, 1).tolist()


def rates(model: GPT, count: int, rounds: int) -> dict:
    """Tokens a second of wall-clock time and CPU milliseconds a token, in rounds of all arms in turns."""
    arms = {
        "engine": EngineArm(model, cache_bytes=CACHE),
        "tight": TightArm(model, count),
        "torch": TorchArm(model, count),
        "engine bfloat16": EngineArm(model, cache_bytes=CACHE, precision="bfloat16"),
        "tight bfloat16": TightArm(model, count, half=True),
    }
    vocab = model.config.vocab
    answers = {name: arm(prompts(count, PROMPT, vocab, 0)) for name, arm in arms.items()}
    for warm in range(3):  # until the engines' caches have been full once: the system hands memory out slowly
        for name in ("engine", "engine bfloat16"):
            arms[name](prompts(16, PROMPT, vocab, 100_000 + warm))
    assert answers["engine"] == answers["tight"], "the same kernels give the same tokens"
    assert answers["engine bfloat16"] == answers["tight bfloat16"]
    same = [a == b for a, b in zip(answers["engine"], answers["torch"], strict=True)]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for number, name in enumerate(turns(list(arms), rounds)):
        asked = prompts(count, PROMPT, vocab, 1 + number)  # new ones: no arm finds a prompt in its cache
        begun, used = time.perf_counter(), time.process_time()
        arms[name](asked)
        seconds[name].append(time.perf_counter() - begun)
        cpu[name].append(time.process_time() - used)
    tokens = count * NEW
    return {
        "streams": count,
        "tokens_a_second": {name: tokens / statistics.median(times) for name, times in seconds.items()},
        "cpu_ms_a_token": {name: 1e3 * statistics.median(times) / tokens for name, times in cpu.items()},
        "share_of_tight": median_ratio(seconds["tight"], seconds["engine"]),
        "share_of_tight_cpu": median_ratio(cpu["tight"], cpu["engine"]),
        "share_of_tight_bfloat16": median_ratio(seconds["tight bfloat16"], seconds["engine bfloat16"]),
        "share_of_tight_bfloat16_cpu": median_ratio(cpu["tight bfloat16"], cpu["engine bfloat16"]),
        "times_torch": median_ratio(seconds["torch"], seconds["engine"]),
        "streams_equal_to_torch": sum(same),
        "seconds": seconds,
        "cpu": cpu,
    }


def median_ratio(of: list[float], to: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def latencies(model: GPT, seconds: float, long: int, every: int, **options) -> dict:
    """16 closed-loop streams of PROMPT and NEW tokens; every so many requests one with a prompt of ``long`` tokens.

    First token: from the request to its first item. Gaps: between two items of a request."""
    arm = EngineArm(model, **options)
    vocab = model.config.vocab
    asked: dict[int, tuple[float, int]] = {}
    last: dict[int, float] = {}
    first: dict[str, list[float]] = {"short": [], "long": []}
    gaps: list[float] = []
    number = 0

    def join() -> None:
        nonlocal number
        number += 1
        length = long if every and number % every == 0 else PROMPT
        id = arm.ask(prompts(1, length, vocab, 10_000 + number)[0])
        asked[id] = time.thread_time(), length

    for _ in range(16):  # one after the other; what comes of these first ones is not counted
        join()
        arm.step()
    begun_at, ramp = time.thread_time(), 16
    while time.thread_time() < begun_at + seconds:
        arm.step()
        for at, messages in arm.messages:
            for message in messages:
                if isinstance(message, Item):
                    if message.id <= ramp:
                        pass
                    elif message.id in last:
                        gaps.append(at - last[message.id])
                    else:
                        begun, length = asked[message.id]
                        first["long" if length == long else "short"].append(at - begun)
                    last[message.id] = at
                elif isinstance(message, Result):
                    del last[message.id]
                    join()
                elif isinstance(message, Failed):
                    raise AssertionError(message.why)
        arm.messages.clear()
    both = first["short"] + first["long"]
    return {
        "long_prompt": long,
        "one_in": every,
        "first_ms": {name: percentiles(times) for name, times in (*first.items(), ("all", both)) if times},
        "gap_ms": percentiles(gaps),
        "gap_p99_over_p50": float(np.percentile(gaps, 99) / np.percentile(gaps, 50)),
        "tokens": len(gaps) + len(both),
        "cpu_ms_a_token": 1e3 * seconds / (len(gaps) + len(both)),
    }


def percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(times, p) * 1e3) for p in (50, 99)} | {"count": len(times)}


def invariance(model: GPT, rounds: int) -> dict:
    """What fixed shapes cost PyTorch's own kernels: the step of 16 streams with them, against one that lets go."""
    torch_step = open_step(model, Options(kernels="torch", cache_bytes=16 * 8 * 1 << 20))
    plain = TorchArm(model, 16)
    asked = prompts(16, PROMPT, model.config.vocab, 5)
    tables = np.arange(16 * 6, dtype=np.int32).reshape(16, 6)
    every = np.arange(16)
    place = np.full(16, PROMPT)
    tokens = np.array([each[0] for each in asked])
    arms = {
        "fixed shapes": lambda: torch_step.run(Rows(tokens, place, every, tables, every)),
        "free": lambda: plain.forward(torch.from_numpy(tokens)[:, None], PROMPT),
    }
    for arm in arms.values():
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for name in turns(list(arms), rounds):
        begun = time.perf_counter()
        for _ in range(3):
            arms[name]()
        times[name].append((time.perf_counter() - begun) / 3)
    return {"step_ms": {n: 1e3 * statistics.median(t) for n, t in times.items()}, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each latency run")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs; saves nothing")
    args = parser.parse_args()
    if not available():
        raise SystemExit("the C++ kernels are not there: nothing to compare")
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # as a model process does: else a collection walks all of torch in the middle of a stream
    model = model_of(args.quick)
    rounds, seconds = (2, 1.0) if args.quick else (args.rounds, args.seconds)
    out: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
        "rates": [],
        "latencies": {},
    }
    for count in (16, 1):
        found = rates(model, count, rounds)
        out["rates"].append(found)
        told = ", ".join(
            f"{name} {rate:.0f}/s {found['cpu_ms_a_token'][name]:.2f} ms"
            for name, rate in found["tokens_a_second"].items()
        )
        print(
            f"{count:>2} streams: {found['share_of_tight']:.3f} of the tight loop "
            f"(of its CPU time {found['share_of_tight_cpu']:.3f}), "
            f"bfloat16 {found['share_of_tight_bfloat16']:.3f}; {found['times_torch']:.2f} times torch; {told}"
        )
    for name, (long, every) in {"short": (0, 0), "512 in 8": (512, 8), "900 in 8": (900, 8)}.items():
        found = out["latencies"][name] = latencies(model, seconds, long, every)
        first = {kind: f"{t['p50']:.0f}/{t['p99']:.0f}" for kind, t in found["first_ms"].items()}
        gap = found["gap_ms"]
        print(
            f"{name}: first token p50/p99 ms {first}; gap {gap['p50']:.1f}/{gap['p99']:.1f}, "
            f"ratio {found['gap_p99_over_p50']:.2f}"
        )
    out["invariance"] = invariance(model, rounds)
    print("PyTorch's own kernels, 16 rows, ms:", out["invariance"]["step_ms"])
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "generation.json").write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
