"""Sharded states against FSDP2 over gloo, on the same model and batch, in the same two processes, in turns.

    python bench/states.py [--rounds 12] [--runs 3] [--steps 2] [--quick]

A GPT of 10.8 million parameters in float32, AdamW (fused), one micro-batch of 8 samples of 128 tokens a worker. FSDP2
shards each block and the root, and frees parameters after each block. Shoal's ZeRO-3 runs between workers that share no
memory (gloo, as FSDP2 does), and between workers of one host; its replicated run is there to show what sharding costs.
A ratio is the median over rounds of this round's time over FSDP2's; the slower worker counts.

Bytes are counted once all are done with a step, not computed: sizes of allocated tensors, and for memory whose pages
come and go, the pages that are there. "States" are parameters, gradients and moments that a worker keeps; what is
gathered or in transit is told by itself. Goal: step time at most FSDP2's, states within 3 % of 16 bytes x parameters /
workers.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from data_parallel import FACTS, Synthetic, free_port
from torch import nn
from turns import turns

from shoal.comm.distributed import DistributedGroup
from shoal.comm.launch import Agent
from shoal.memory.blocks import find_blocks
from shoal.memory.optimizer_need import state_bytes
from shoal.models.registry import build, task_for
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec
from shoal.train.api import PRELOAD
from shoal.train.worker import Worker

RESULTS = Path(__file__).parent / "results"
EACH = 8  # samples of a worker in a step
CONTROL = "fsdp2 over gloo"
OPTIONS = {
    "10M": {"layers": 6, "heads": 6, "width": 384, "dropout": 0.0},
    "tiny": {"layers": 2, "heads": 2, "width": 64, "dropout": 0.0},
}


def make(size: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    spec = ModelSpec(kind="gpt", options=OPTIONS[size])
    return build(spec, FACTS["gpt"]), task_for(spec, FACTS["gpt"])


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)


class Arm:
    """``step()`` does one step; ``held()`` counts bytes by kind once it is done."""

    def __init__(self, steps: Iterator[None], held: Callable[[], dict[str, int]]) -> None:
        self.steps, self.held = steps, held


def fsdp_arm(group, size: str) -> Arm:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, task = make(size)
    mesh = init_device_mesh("cpu", (group.world,))
    for block in find_blocks(net).values():
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer, source = adamw(net), Synthetic("gpt")

    def steps() -> Iterator[None]:
        for step in range(10**9):
            ids = (np.arange(EACH) + (step * group.world + group.rank) * EACH) % len(source)
            optimizer.zero_grad(set_to_none=True)
            loss, count = task.loss(net, source.fetch(ids, 0))
            (loss / count).backward()
            optimizer.step()
            yield

    def held() -> dict[str, int]:
        def local(tensor: torch.Tensor) -> int:
            return getattr(tensor, "to_local", lambda: tensor)().nbytes

        states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return {
            "parameters": sum(local(p) for p in net.parameters()),
            "gradients": sum(local(p.grad) for p in net.parameters() if p.grad is not None),
            "optimizer": sum(map(local, states)),
        }

    return Arm(steps(), held)


def shoal_arm(group, size: str, states: str) -> Arm:
    plan = Plan(mesh={"data": group.world}, states=states, device="cpu")
    worker = Worker(group, plan, shards=group.world)
    net, task = make(size)
    called = worker.model(net)
    optimizer = worker.optimizer(adamw(net))

    def steps() -> Iterator[None]:
        for step in worker.steps(Synthetic("gpt"), batch=EACH * group.world, steps=10**9):
            for batch in step:
                loss, count = task.loss(called, batch)
                step.backward(loss, count)
            step.commit()
            yield

    def held() -> dict[str, int]:
        if states != "replicated":
            return worker._update.held_bytes()
        return {
            "parameters": sum(p.nbytes for p in net.parameters()),
            "gradients": sum(p.grad.nbytes for p in net.parameters()),
            "optimizer": state_bytes(optimizer),
        }

    return Arm(steps(), held)


def measure(group, size: str, rounds: int, steps: int, store: int) -> dict:
    os.environ.update(
        RANK=str(group.rank), WORLD_SIZE=str(group.world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store)
    )
    joined = DistributedGroup(120.0, accelerator=False)
    arms = {
        CONTROL: fsdp_arm(joined, size),
        "shoal zero3 over gloo": shoal_arm(joined, size, "zero3"),
        "shoal zero2 over gloo": shoal_arm(joined, size, "zero2"),
        "shoal replicated over gloo": shoal_arm(joined, size, "replicated"),
        "shoal zero3 on one host": shoal_arm(group, size, "zero3"),
        "shoal zero1 on one host": shoal_arm(group, size, "zero1"),
        "shoal replicated on one host": shoal_arm(group, size, "replicated"),
    }
    for arm in arms.values():  # kernels, caches, buffers
        for _ in range(2):
            next(arm.steps)
    wall: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    held: dict[str, dict[str, int]] = {}
    for name in turns(list(arms), rounds):
        group.gather(b"")
        begun, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(arms[name].steps)
        group.gather(b"")
        wall[name].append((time.perf_counter() - begun) / steps)
        cpu[name].append((time.process_time() - used) / steps)
        held.setdefault(name, arms[name].held())
        group.gather(b"")  # nobody goes on while another counts
    for name in ("shoal zero3 over gloo", "shoal zero2 over gloo", "shoal replicated over gloo"):
        arms[name].steps.close()
    joined.close()
    return {"wall": wall, "cpu": cpu, "held": held}


def summary(ranks: list[dict], parameters: int) -> dict[str, dict]:
    """The slower worker's time of each round, its ratio to FSDP2's, and the bytes of the worker that holds most."""
    names = list(ranks[0]["wall"])
    rounds = range(len(ranks[0]["wall"][CONTROL]))
    wall = {name: [max(rank["wall"][name][i] for rank in ranks) for i in rounds] for name in names}
    cpu = {name: [sum(rank["cpu"][name][i] for rank in ranks) for i in rounds] for name in names}
    ideal = 16 * parameters / len(ranks)
    found = {}
    for name in names:
        states = [sum(rank["held"][name].get(k, 0) for k in ("parameters", "gradients", "optimizer")) for rank in ranks]
        found[name] = {
            "step_ms": statistics.median(wall[name]) * 1e3,
            "ratio": statistics.median(a / b for a, b in zip(wall[name], wall[CONTROL], strict=True)),
            "cpu_ratio": statistics.median(a / b for a, b in zip(cpu[name], cpu[CONTROL], strict=True)),
            "states_over_ideal": max(states) / ideal,
            "held": [rank["held"][name] for rank in ranks],
            "wall": wall[name],
            "cpu": cpu[name],
        }
    return found


def medians(runs: list[dict]) -> dict[str, dict[str, float]]:
    keys = ("step_ms", "ratio", "cpu_ratio", "states_over_ideal")
    return {name: {key: statistics.median(run[name][key] for run in runs) for key in keys} for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of each arm in a round")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs; saves nothing")
    args = parser.parse_args()
    size = "tiny" if args.quick else "10M"
    parameters = sum(p.numel() for p in make(size)[0].parameters())
    out: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "parameters": parameters,
        "samples_per_worker": EACH,
        "workers": 2,
        "load_average": os.getloadavg(),
        "runs": [],
    }
    with Agent(PRELOAD) as agent:
        for _ in range(args.runs):
            ranks = agent.run(measure, (size, args.rounds, args.steps, free_port()), workers=2)
            out["runs"].append(summary(ranks, parameters))
            out["median"] = medians(out["runs"])
            if not args.quick:  # a run that has been made is kept, whatever becomes of the others
                RESULTS.mkdir(exist_ok=True)
                (RESULTS / "states.json").write_text(json.dumps(out, indent=1))
    for name, row in out["median"].items():
        held = "  ".join(f"{k} {v / 2**20:.1f}" for k, v in out["runs"][0][name]["held"][0].items())
        print(
            f"{name:30} {row['step_ms']:8.1f} ms  {row['ratio']:.3f} of FSDP2 (cpu {row['cpu_ratio']:.3f})  "
            f"states {row['states_over_ideal']:.3f} of 16 P / W   MiB on rank 0: {held}"
        )


if __name__ == "__main__":
    main()
