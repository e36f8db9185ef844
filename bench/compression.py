"""Compressors on one core, with error feedback: the fused kernels, their twins, and what one would write in PyTorch.

python bench/compression.py [--rounds 7]

In every round each runs once, after a copy of the same bytes: figures are medians over rounds, ratios those of a round.
Bytes are those of the float32 gradient. Raw numbers go to bench/results/compression.json.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch

from shoal.comm.compression.codec import Codec
from shoal.comm.compression.codecs import CODECS
from shoal.comm.compression.low_rank import orthonormal, squarest, start_of
from shoal.comm.native import build

RESULTS = Path(__file__).parent / "results"
BLOCK = 2048
SIZES = (512 * BLOCK, 4882 * BLOCK)  # elements: 4 MiB, a bucket, and 40 MB, which no cache holds
Compress = Callable[[torch.Tensor, torch.Tensor], object]


def cast(dtype: torch.dtype) -> Compress:
    def compress(gradient: torch.Tensor, error: torch.Tensor) -> object:
        wanted = gradient + error
        sent = wanted.to(dtype)
        error.copy_(wanted - sent.float())
        return sent

    return compress


def int8(gradient: torch.Tensor, error: torch.Tensor) -> object:
    wanted = (gradient + error).view(-1, BLOCK)
    scales = wanted.abs().amax(dim=1, keepdim=True) / 127
    sent = (wanted / scales).round().clamp(-127, 127).to(torch.int8)
    error.copy_((wanted - sent.float() * scales).view(-1))
    return sent, scales


def topk(gradient: torch.Tensor, error: torch.Tensor) -> object:
    wanted = gradient + error
    places = wanted.abs().topk(len(wanted) // 100, sorted=False).indices
    values = wanted[places]
    error.copy_(wanted)
    error[places] = 0.0
    return places, values


def topk_sampled(gradient: torch.Tensor, error: torch.Tensor) -> object:
    wanted = gradient + error
    size = wanted.abs()
    sample = size[:: len(size) // 16384]
    threshold = sample.topk(len(sample) // 100).values[-1]
    places = (size >= threshold).nonzero().view(-1)
    values = wanted[places]
    error.copy_(wanted)
    error[places] = 0.0
    return places, values


POWERS = 2 ** torch.arange(8, dtype=torch.uint8)


def onebit(gradient: torch.Tensor, error: torch.Tensor) -> object:
    wanted = (gradient + error).view(-1, BLOCK)
    means = wanted.abs().mean(dim=1, keepdim=True)
    negative = wanted < 0
    sent = (negative.view(-1, 8) * POWERS).sum(dim=1, dtype=torch.uint8)
    error.copy_((wanted - torch.where(negative, -means, means)).view(-1))
    return sent, means


EAGER: dict[str, dict[str, Compress]] = {
    "fp16": {"eager": cast(torch.float16)},
    "bf16": {"eager": cast(torch.bfloat16)},
    "int8": {"eager": int8},
    "topk": {"eager": topk, "eager, sampled": topk_sampled},
    "1bit": {"eager": onebit},
}


def timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def twin(codec: Codec, *arguments: torch.Tensor) -> None:
    os.environ["SHOAL_NATIVE"] = "0"
    try:
        codec.compress(*arguments)
    finally:
        del os.environ["SHOAL_NATIVE"]


def measured(name: str, elements: int, rounds: int) -> dict:
    """Seconds of each arm in each round."""
    codec = CODECS[name]()
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(elements, generator=generator)
    payload = torch.zeros(codec.payload_bytes(elements), dtype=torch.uint8)
    total, copy = torch.zeros(elements), torch.zeros(elements)
    arms: dict[str, Callable[[], object]] = {"memcpy": lambda: copy.copy_(gradient)}
    errors = {arm: torch.zeros(elements) for arm in ("fused", "twin", *EAGER[name])}
    arms["fused"] = lambda: codec.compress(gradient, errors["fused"], payload)
    arms["fused, open and add"] = lambda: codec.add(payload, total)
    arms["twin"] = lambda: twin(codec, gradient, errors["twin"], payload)
    for arm, compress in EAGER[name].items():
        arms[arm] = lambda compress=compress, arm=arm: compress(gradient, errors[arm])
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for index in range(rounds + 1):
        for arm, run in arms.items():
            spent = timed(run)
            if index:  # the first round warms up
                seconds[arm].append(spent)
    return seconds


def low_rank(elements: int, rounds: int) -> dict:
    """PowerSGD of rank 4, what one rank computes: matmul-bound, in PyTorch."""
    [(rows, columns), _] = squarest(elements)
    gradient, copy = torch.randn(rows * columns), torch.zeros(rows * columns)
    error = torch.zeros(rows, columns)
    q = start_of(columns, 4, 0)

    def compress() -> None:
        error.add_(gradient.view(rows, columns))
        basis = orthonormal(torch.mm(q, error.t()))
        error.addmm_(basis.t(), torch.mm(basis, error), alpha=-1.0)

    arms: dict[str, Callable[[], object]] = {"memcpy": lambda: copy.copy_(gradient), "torch": compress}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for index in range(rounds + 1):
        for arm, run in arms.items():
            spent = timed(run)
            if index:
                seconds[arm].append(spent)
    return seconds


def summary(seconds: dict, elements: int) -> dict:
    main = "fused" if "fused" in seconds else "torch"
    ours = seconds[main]

    def ratio(arm: str) -> float:
        return statistics.median(other / own for other, own in zip(seconds[arm], ours, strict=True))

    return {
        "gb_per_s": {arm: 4 * elements / statistics.median(spent) / 1e9 for arm, spent in seconds.items()},
        "times_faster_than": {arm: ratio(arm) for arm in seconds if arm not in (main, "fused, open and add")},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    assert build.kernels() is not None, build.why_not(["kernels"])
    load = os.getloadavg()
    rows = []
    for elements in SIZES:
        for name in (*CODECS, "powersgd"):
            seconds = low_rank(elements, args.rounds) if name == "powersgd" else measured(name, elements, args.rounds)
            row = {"compressor": name, "elements": elements, **summary(seconds, elements), "seconds": seconds}
            if name in CODECS:
                row["times_smaller"] = CODECS[name]().ratio(elements)
            rows.append(row)
            speeds = "  ".join(f"{arm} {speed:.2f}" for arm, speed in row["gb_per_s"].items())
            ratios = ", ".join(f"{value:.1f}x {arm}" for arm, value in row["times_faster_than"].items())
            print(f"{name:9} {4 * elements / 1e6:5.1f} MB  GB/s: {speeds}  |  {ratios}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "compression.json"
    out = {
        "machine": f"{platform.machine()}, one core",
        "torch": torch.__version__,
        "load_average": load,
        "load_average_after": os.getloadavg(),
        "rows": rows,
    }
    file.write_text(json.dumps(out, indent=1))
    print("raw numbers:", file)


if __name__ == "__main__":
    main()
