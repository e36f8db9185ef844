"""What saving memory costs: activation peak and step time of each way, beside training without, in turns.

    python bench/memory.py [--rounds 12] [--layers 8] [--width 384]

Every arm is Shoal's own worker (1 worker, 1 shard, AdamW, 1 thread) on one GPT of more than 10 million parameters. A
round is a step of each arm, in an order that rotates; ratios are of medians. The activation peak is what the allocator
counted in one micro-batch, forward and backward, beyond weights, gradients and optimiser states. `budget` is what
memory.peak_bytes chooses where 0.70 of the activations are allowed, `budget of full` where 0.40 are. The weights of
all arms are compared after two steps, bit by bit.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from data_parallel import FACTS, Synthetic
from turns import turns

from shoal.comm.launch import Agent
from shoal.memory.gauge import gauge_for
from shoal.memory.rehearsal import passes_of, rehearse
from shoal.models.registry import build, task_for
from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec
from shoal.train.api import PRELOAD
from shoal.train.worker import Worker

RESULTS = Path(__file__).parent / "results"
GOALS = {
    "full": (0.40, 1.20),
    "budget": (0.70, 1.05),
    "disk": (None, 1.10),
    "budget of full": (0.40, 1.20),  # what full recomputation may take, spent on the blocks that are dearest to compute
}  # activation peak, time; of training without


class Arm:
    def __init__(self, group, memory: MemoryPlan, spec: ModelSpec, batch: int) -> None:
        self.worker = worker = Worker(group, Plan(memory=memory, device="cpu"), shards=1)
        torch.manual_seed(0)
        self.net, self.task, self.batch = build(spec, FACTS["gpt"]), task_for(spec, FACTS["gpt"]), batch
        worker.model(self.net)
        worker.optimizer(torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True))
        if memory.budget_bytes:
            worker.prepare_memory(Synthetic("gpt"), batch, lambda part: self.task.loss(self.net, part)[0])
            worker.memory.gauge = None  # the arms share a process: what it holds says nothing of one of them
        self.steps = self._steps()

    def _steps(self) -> Iterator[str]:
        for step in self.worker.steps(Synthetic("gpt"), batch=self.batch, steps=10**6):
            for batch in step:
                loss, count = self.task.loss(self.net, batch)
                step.backward(loss, count)
            step.commit()
            yield self.worker.weights_sha256 if step.number <= 2 else ""

    def peak(self, gauge) -> int:
        batch = Synthetic("gpt").fetch(np.arange(self.batch), 0)
        return rehearse(self.net, passes_of(lambda: self.task.loss(self.net, batch)[0]), gauge)


def budget_for(group, spec: ModelSpec, batch: int, share: float) -> MemoryPlan:
    """One that leaves room for this share of the activations."""
    (need,) = Arm(group, MemoryPlan(peak_bytes="1TiB"), spec, batch).worker.memory.predicted
    both = need["activations"] + need["gradients"]  # with one micro-batch a step, gradients come while activations go
    return MemoryPlan(peak_bytes=need["peak"] - int((1 - share) * both))


def measure(group, memories: dict[str, MemoryPlan], spec: ModelSpec, batch: int, rounds: int) -> dict:
    gauge = gauge_for(torch.device("cpu"))
    for name in ("budget", "budget of full"):
        memories = {**memories, name: budget_for(group, spec, batch, GOALS[name][0])}
    arms = {name: Arm(group, memory, spec, batch) for name, memory in memories.items()}
    hashes = {name: [next(arm.steps), next(arm.steps)] for name, arm in arms.items()}
    assert len(set(map(tuple, hashes.values()))) == 1, f"the arms' weights differ: {hashes}"
    peaks = {name: max(arm.peak(gauge) for _ in range(2)) for name, arm in arms.items()}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    core: dict[str, list[float]] = {name: [] for name in arms}
    gc.collect()
    for name in turns(list(arms), rounds):
        begun, used = time.perf_counter(), time.thread_time()
        next(arms[name].steps)
        wall[name].append(time.perf_counter() - begun)
        core[name].append(time.thread_time() - used)
    return {
        "chosen": {name: arms[name].worker.memory.chosen.ways for name in ("budget", "budget of full")},
        "peaks": peaks,
        "wall": wall,
        "core": core,
        "parameters": sum(p.numel() for p in arms["none"].net.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    spec = ModelSpec(kind="gpt", options={"layers": args.layers, "heads": 6, "width": args.width, "dropout": 0.0})
    memories = {
        "none": MemoryPlan(),
        "full": MemoryPlan(recompute="full"),
        "disk": MemoryPlan(offload_activations="disk"),
    }
    with Agent(PRELOAD) as agent:
        found = agent.run(measure, (memories, spec, args.batch, args.rounds), workers=1, threads=1)[0]
    out = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "model": spec.options,
        "batch": args.batch,
        "load_average": os.getloadavg(),
        **found,
        "arms": {},
    }
    print({key: out[key] for key in ("machine", "torch", "model", "batch", "parameters", "chosen", "load_average")})
    base, base_core = (statistics.median(found[kind]["none"]) for kind in ("wall", "core"))
    for name in found["wall"]:
        step = statistics.median(found["wall"][name])
        out["arms"][name] = row = {
            "step_ms": step * 1e3,
            "time": step / base,
            "core_time": statistics.median(found["core"][name]) / base_core,  # of the thread that computes
            "activation_bytes": found["peaks"][name],
            "activations": found["peaks"][name] / found["peaks"]["none"],
        }
        goal = GOALS.get(name, (None, None))
        print(
            f"{name:12} {row['step_ms']:8.1f} ms  time {row['time']:.3f} (goal {goal[1] or '-'}), "
            f"of its core {row['core_time']:.3f}   "
            f"activations {row['activation_bytes'] / 2**20:7.1f} MiB, {row['activations']:.3f} (goal {goal[0] or '-'})"
        )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "memory.json"
    file.write_text(json.dumps(out, indent=1))
    print("raw numbers:", file)


if __name__ == "__main__":
    main()
