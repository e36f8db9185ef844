"""How long a checkpoint holds up training, against a plain copy of the same state in memory, in the same run.

    python bench/checkpoint.py [--rounds 15] [--threads 1] [--out bench/results/checkpoint.json]

Each round, in an order that turns from round to round: `copy_` into memory that was touched before (the control),
`clone` into new memory (what a simple program does), and `submit`. Between them a compute loop of matrix products runs;
its time an iteration while the checkpoint is written behind it, against without, is what the writer costs in passing.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from turns import turns

from shoal.train.checkpoint import newest
from shoal.train.snapshot import BackgroundWriter


def gpt_state(layers: int = 6, width: int = 384, vocab: int = 256, context: int = 256) -> dict[str, Tensor]:
    """Parameters of a GPT of about 10.8M parameters and their AdamW moments."""
    shapes = {"tokens": (vocab, width), "positions": (context, width), "norm.weight": (width,), "norm.bias": (width,)}
    for layer in range(layers):
        for name, shape in {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "qkv.weight": (3 * width, width),
            "qkv.bias": (3 * width,),
            "out.weight": (width, width),
            "out.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "up.weight": (4 * width, width),
            "up.bias": (4 * width,),
            "down.weight": (width, 4 * width),
            "down.bias": (width,),
        }.items():
            shapes[f"blocks.{layer}.{name}"] = shape
    state = {f"model/{name}": torch.randn(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        state[f"optimizer/{name}/exp_avg"] = torch.randn(shape)
        state[f"optimizer/{name}/exp_avg_sq"] = torch.rand(shape)
        state[f"optimizer/{name}/step"] = torch.tensor(1.0)
    return state


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    state = gpt_state()
    target = {name: torch.zeros_like(tensor).fill_(0) for name, tensor in state.items()}
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    raw: dict[str, list[float]] = {
        key: [] for key in ("copy_s", "clone_s", "submit_s", "write_s", "compute_alone_s", "compute_during_write_s")
    }

    def compute() -> float:
        return seconds(lambda: torch.mm(a, b))

    def settle() -> None:
        for _ in range(20):
            raw["compute_alone_s"].append(compute())

    def copy() -> None:
        settle()
        raw["copy_s"].append(seconds(lambda: [target[name].copy_(tensor) for name, tensor in state.items()]))

    def clone() -> None:
        settle()
        raw["clone_s"].append(seconds(lambda: [tensor.clone() for tensor in state.values()]))

    with BackgroundWriter(folder, like=state, keep=2) as writer:

        def submit() -> None:
            settle()
            step = len(raw["submit_s"])
            raw["submit_s"].append(seconds(lambda: writer.submit(state, {"step": step}, best=False)))
            while not (done := writer.poll()):
                raw["compute_during_write_s"].append(compute())
            if done[0].error:
                raise SystemExit(done[0].error)
            raw["write_s"].append(done[0].write_s)

        for work in turns([copy, clone, submit], rounds):
            work()
    loaded = newest(folder)[0]
    if loaded is None or not all(torch.equal(loaded.tensors[name], state[name]) for name in state):
        raise SystemExit("what was written is not the state that was submitted")
    raw["state_bytes"] = [float(sum(tensor.nbytes for tensor in state.values()))]
    return raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        raw = measure(Path(folder), args.rounds)
    middle = {key: median(values) for key, values in raw.items()}
    figures = {
        "state_mb": middle["state_bytes"] / 1e6,
        "stall_over_copy": middle["submit_s"] / middle["copy_s"],
        "stall_over_clone": middle["submit_s"] / middle["clone_s"],
        "stall_ms": middle["submit_s"] * 1e3,
        "copy_ms": middle["copy_s"] * 1e3,
        "write_ms": middle["write_s"] * 1e3,
        "compute_slowdown_during_write": middle["compute_during_write_s"] / middle["compute_alone_s"],
        "load_average": os.getloadavg()[0],
    }
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": args.threads,
    }
    for name, value in figures.items():
        print(f"{name:32} {value:.4g}")
    print(f"goal: stall_over_copy at most 2: {'reached' if figures['stall_over_copy'] <= 2 else 'MISSED'}")
    rounded = {key: [round(value, 6) for value in values] for key, values in raw.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "figures": figures, "raw": rounded}) + "\n")


if __name__ == "__main__":
    main()
