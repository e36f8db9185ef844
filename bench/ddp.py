"""Plain DistributedDataParallel over no communication, the shm backend and gloo, and Shoal's exact data parallelism.

Shoal runs twice: as `shoal train` does on one host (what ``states = "auto"`` comes to), and with whole states, as a
loop of your own does unless it asks for more.

    python bench/ddp.py [--rounds 15] [--runs 3] [--quick]

Two workers train an MLP of 10 million parameters, 32 samples each a step, SGD with momentum. All arms live in the same
two processes and take turns: a round runs a few steps of each, in an order that rotates. The control is the same two
processes at the same time without communication. A ratio is the median over rounds of this round's time over this
round's control; the slower worker counts. Goals: DDP over shm costs at most 10 % over no communication, Shoal's exact
data parallelism at most 8 %, and it makes at least 1.15 times the steps of DDP over gloo.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from turns import turns

import shoal.comm
from shoal.comm.launch import Agent
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import OptimizerSpec, Recipe
from shoal.train.api import PRELOAD
from shoal.train.states_choice import settled_states
from shoal.train.worker import Worker

RESULTS = Path(__file__).parent / "results"
SAMPLES, CLASSES, EACH = 2048, 10, 32  # samples of the set; classes; samples of a worker in a step
SIZES = {"10M": (784, 2048, 2048, 2048), "tiny": (16, 32, 32, 32)}
CONTROL, ALONE, GLOO = "no communication", "ddp alone", "ddp over gloo"


class Synthetic:
    """Samples that cost nothing to load: the same for every arm."""

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(SAMPLES, width, generator=generator)
        self.targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        self.fingerprint = "synthetic"

    def __len__(self) -> int:
        return SAMPLES

    def fetch(self, ids: np.ndarray, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        where = torch.tensor(ids)
        return self.inputs[where], self.targets[where]


def mlp(size: str) -> nn.Sequential:
    torch.manual_seed(0)
    widths, layers = SIZES[size], []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)


def do_nothing(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def plain_arm(group, size: str, process_group, hook=None) -> Iterator[float]:
    """A hand-written loop; over ``process_group`` as DDP, or alone. Yields the loss of the worker's own samples."""
    net = mlp(size)
    called = net if process_group is None else DistributedDataParallel(net, process_group=process_group)
    if hook:
        called.register_comm_hook(None, hook)
    optimizer, source = sgd(net), Synthetic(SIZES[size][0])
    for step in range(10**9):
        ids = (np.arange(EACH) + (step * group.world + group.rank) * EACH) % len(source)
        inputs, targets = source.fetch(ids, 0)
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(called(inputs), targets)
        loss.backward()
        optimizer.step()
        yield loss.item()


def shoal_arm(group, size: str, plan: Plan) -> Iterator[float]:
    worker = Worker(group, plan, shards=group.world)
    net = mlp(size)
    called = worker.model(net)
    worker.optimizer(sgd(net))
    for step in worker.steps(Synthetic(SIZES[size][0]), batch=EACH * group.world, steps=10**9):
        for inputs, targets in step:
            loss = nn.functional.cross_entropy(called(inputs), targets, reduction="sum")
            step.backward(loss, len(targets))
        step.commit()
        yield loss.item() / EACH


def measure(group, size: str, rounds: int, steps: int, file: str) -> dict:
    shoal.comm.install()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=group.rank, world_size=group.world)
    over_shm, over_gloo = dist.new_group(backend="shm"), dist.new_group(backend="gloo")
    trained = Recipe(steps=1, optimizer=OptimizerSpec(name="sgd"))
    chosen, _ = settled_states(Plan(mesh={"data": group.world}), trained)
    arms: dict[str, Callable[[], Iterator[float]]] = {
        CONTROL: lambda: plain_arm(group, size, None),
        ALONE: lambda: plain_arm(group, size, over_shm, do_nothing),
        "ddp over shm": lambda: plain_arm(group, size, over_shm),
        GLOO: lambda: plain_arm(group, size, over_gloo),
        f"shoal train ({chosen.states})": lambda: shoal_arm(group, size, chosen),
        "shoal, whole states": lambda: shoal_arm(group, size, replace(chosen, states="replicated")),
    }
    running = {name: arm() for name, arm in arms.items()}
    for arm in running.values():  # kernels, caches, buffers; DDP orders its buckets anew after the first step
        for _ in range(3):
            next(arm)
    out: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in running}
    for name in turns(list(running), rounds):
        group.gather(b"")
        begun, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(running[name])
        group.gather(b"")
        out[name]["wall"].append((time.perf_counter() - begun) / steps)
        out[name]["cpu"].append((time.process_time() - used) / steps)
    for arm in running.values():
        arm.close()
    dist.destroy_process_group()
    return out


def summary(ranks: list[dict]) -> dict[str, dict]:
    """The slower worker's time of each round, and its ratio to the same round of the control."""
    rounds = range(len(ranks[0][CONTROL]["wall"]))
    wall = {name: [max(rank[name]["wall"][i] for rank in ranks) for i in rounds] for name in ranks[0]}
    cpu = {name: [sum(rank[name]["cpu"][i] for rank in ranks) for i in rounds] for name in ranks[0]}

    def ratio(of: list[float], to: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(of, to, strict=True))

    return {
        name: {
            "step_ms": statistics.median(wall[name]) * 1e3,
            "overhead": ratio(wall[name], wall[CONTROL]) - 1,
            "overhead_of_transport": ratio(wall[name], wall[ALONE]) - 1,
            "cpu_overhead": ratio(cpu[name], cpu[CONTROL]) - 1,
            "steps_against_gloo": ratio(wall[GLOO], wall[name]),
            "wall": wall[name],
            "cpu": cpu[name],
        }
        for name in wall
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each arm in a round")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs; saves nothing")
    args = parser.parse_args()
    size = "tiny" if args.quick else "10M"
    out: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in mlp(size).parameters()),
        "samples_per_worker": EACH,
        "workers": 2,
        "load_average": os.getloadavg(),
        "runs": [],
    }
    with Agent(PRELOAD) as agent, tempfile.TemporaryDirectory() as folder:
        for run in range(args.runs):
            arguments = (size, args.rounds, args.steps, f"{folder}/store{run}")
            out["runs"].append(summary(agent.run(measure, arguments, workers=2)))
    out["median"] = {
        name: {
            key: statistics.median(run[name][key] for run in out["runs"])
            for key in ("step_ms", "overhead", "overhead_of_transport", "cpu_overhead", "steps_against_gloo")
        }
        for name in out["runs"][0]
    }
    for name, row in out["median"].items():
        print(
            f"{name:22} {row['step_ms']:8.2f} ms   over no communication {row['overhead']:+7.1%}   over ddp alone "
            f"{row['overhead_of_transport']:+7.1%}   cpu {row['cpu_overhead']:+7.1%}   "
            f"steps against gloo {row['steps_against_gloo']:5.2f}"
        )
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "ddp.json").write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
