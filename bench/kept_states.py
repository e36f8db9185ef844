"""Optimiser states in 8 bits or on disk, parameters in bfloat16: bytes, and the time of an update beside fused AdamW.

    python bench/kept_states.py [--rounds 15] [--quick]

A GPT of 10.8M parameters in one process with one thread. Every arm has a model and an optimiser of its own and the same
gradients; the control is torch's fused AdamW on float32. All take turns, in an order that rotates, and so does a whole
forward and backward pass of 16 samples of 128 tokens: what an update costs is said of the update and of the step, in
processor time of the process, which other jobs disturb less; seconds are in the raw numbers.
Bytes are those of the state's tensors, and those of them that lie in the process between two updates.
Goals: 8-bit states take at most 0.26 of the bytes; the step is at most 1.10 times the control's in every arm; states on
disk leave nothing of theirs in the process. Raw numbers to bench/results/kept_states.json.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from turns import turns

from shoal.memory.keeping import keep_parameters, keep_states
from shoal.memory.shelves import OnDisk
from shoal.models.registry import build
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.recipe import ModelSpec

RESULTS = Path(__file__).parent / "results"
SIZES = {"gpt": (6, 6, 384, 128, 256), "tiny": (1, 2, 64, 16, 64)}  # layers, heads, width, context, vocabulary
CONTROL, PASSES = "fused AdamW", "forward and backward"
ARMS = {
    CONTROL: MemoryPlan(),
    "8 bits": MemoryPlan(optimizer_bits=8),
    "bfloat16, stochastic": MemoryPlan(parameters="bfloat16-stochastic"),
    "bfloat16, compensated": MemoryPlan(parameters="bfloat16-compensated"),
    "8 bits, stochastic": MemoryPlan(optimizer_bits=8, parameters="bfloat16-stochastic"),
    "states on disk": MemoryPlan(offload_optimizer="disk"),
    "states and parameters on disk": MemoryPlan(offload_optimizer="disk", offload_parameters="disk"),
}


def gpt(size: str) -> nn.Module:
    layers, heads, width, context, vocab = SIZES[size]
    torch.manual_seed(0)
    options = {"layers": layers, "heads": heads, "width": width, "context": context}
    return build(ModelSpec(kind="gpt", options=options), {"vocab": vocab, "context": context})


class Arm:
    def __init__(self, name: str, size: str, folder: str) -> None:
        plan = ARMS[name]
        if plan.uses_disk:
            plan = MemoryPlan(**{**vars(plan), "offload_dir": folder})
        self.model = gpt(size)
        said: list[str] = []
        rest = {"device": torch.device("cpu"), "sharing": 1, "say": said.append, "tell": said.append}
        parameters = keep_parameters(self.model, plan, **rest)
        made = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.steps = 0
        self.optimizer = keep_states(made, self.model, plan, parameters, seed=0, step=lambda: self.steps, **rest)
        assert not said, said
        stream = torch.Generator().manual_seed(1)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=stream) * 1e-3

    def update(self) -> None:
        self.optimizer.step()
        self.steps += 1

    def bytes(self) -> dict[str, int]:
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        keeping = getattr(self.optimizer, "_keeping", None)
        shelves = [s for s in (keeping.shelf, keeping.weights) if isinstance(s, OnDisk)] if keeping else []
        parameters = [p.detach() for p in self.model.parameters()]

        def here(tensors: list[Tensor]) -> int:
            return sum(resident(t) if any(s.holds(t) for s in shelves) else t.nbytes for t in tensors)

        return {
            "states": sum(t.nbytes for t in states),
            "states_here": here(states),
            "parameters": sum(p.nbytes for p in parameters),
            "parameters_here": here(parameters),
        }


def resident(tensor: Tensor) -> int:
    """Bytes of a mapped tensor that are in this process's memory (Linux)."""
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    found = re.search(rf"^{tensor.data_ptr():x}-.*?^Rss: +(\d+) kB", maps, re.MULTILINE | re.DOTALL)
    return int(found[1]) * 1024 if found else 0


def passes(size: str) -> Callable[[], None]:
    model = gpt(size)
    context, vocab = SIZES[size][3:]
    tokens = torch.randint(0, vocab, (16, context), generator=torch.Generator().manual_seed(2))

    def run() -> None:
        model(tokens).square().mean().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", default="", help="the disk")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and nothing is written down")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = "tiny" if args.quick else "gpt"
    arms = {name: Arm(name, size, args.dir) for name in ARMS}
    works: dict[str, Callable[[], None]] = {PASSES: passes(size), **{name: a.update for name, a in arms.items()}}
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    times: dict[str, list[float]] = {name: [] for name in works}
    for name in turns(list(works), 2 if args.quick else args.rounds):
        begun = time.perf_counter(), time.process_time()
        works[name]()
        seconds[name].append(time.perf_counter() - begun[0])
        times[name].append(time.process_time() - begun[1])
    medians = {name: statistics.median(found) for name, found in times.items()}
    counted = {name: arm.bytes() for name, arm in arms.items()}
    whole, step = counted[CONTROL], medians[PASSES] + medians[CONTROL]
    elements = sum(p.numel() for p in arms[CONTROL].model.parameters())
    print(f"{elements / 1e6:.1f}M parameters; forward and backward {medians[PASSES] * 1e3:.0f} ms")
    print(f"{'':30} {'update':>9} {'x fused':>8} {'x step':>7} {'states':>7} {'here':>6} {'params':>7} {'here':>6}")
    for name, found in counted.items():
        shares = [found[key] / whole[key.removesuffix("_here")] for key in found]
        print(
            f"{name:30} {medians[name] * 1e3:6.1f} ms {medians[name] / medians[CONTROL]:8.2f} "
            f"{(medians[PASSES] + medians[name]) / step:7.3f} {shares[0]:7.3f} {shares[1]:6.3f} {shares[2]:7.3f} "
            f"{shares[3]:6.3f}"
        )
    if not args.quick:
        machine = {"processor": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        raw = {"machine": machine, "parameters": elements, "seconds": seconds, "cpu_seconds": times, "bytes": counted}
        (RESULTS / "kept_states.json").write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
