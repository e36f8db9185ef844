"""Step time of Shoal's data parallelism against plain PyTorch and DDP over gloo, in the same processes, in turns.

    python bench/data_parallel.py [--model gpt|cnn] [--rounds 8] [--precision float32|bfloat16]

One worker: Shoal against a plain hand-written loop, as a script of its own (the control) and inside of Shoal's worker
process, where it has the worker's allocator settings. Two workers: Shoal exact (2, 4 and 8 shards) and fast against
DistributedDataParallel over gloo, on the same model and global batch. Every round runs a few steps of each arm, in an
order that rotates; a ratio is the median over rounds of this round's Shoal time over this round's control time.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from turns import turns

from shoal.comm.launch import Agent
from shoal.models.registry import build, task_for
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec
from shoal.train.api import PRELOAD
from shoal.train.precision import autocast
from shoal.train.worker import Worker

RESULTS = Path(__file__).parent / "results"
STEPS = 3  # of each arm in a round
SPECS = {
    "gpt": (ModelSpec(kind="gpt", options={"layers": 6, "heads": 6, "width": 384, "dropout": 0.0}), 16),
    "cnn": (ModelSpec(kind="cnn"), 256),
}
FACTS = {"gpt": {"vocab": 256, "context": 128}, "cnn": {"shape": (1, 28, 28), "classes": 10}}


class Synthetic:
    """Samples that cost nothing to load: the same for every arm."""

    def __init__(self, model: str) -> None:
        generator = torch.Generator().manual_seed(0)
        if model == "gpt":
            self.data = {"tokens": torch.randint(256, (512, 129), generator=generator)}
        else:
            inputs = torch.randn(2048, 1, 28, 28, generator=generator)
            self.data = {"input": inputs, "target": torch.randint(10, (2048,), generator=generator)}
        self.facts = FACTS[model]
        self.fingerprint = "synthetic"

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def fetch(self, ids: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        where = torch.tensor(ids)
        return {name: tensor[where] for name, tensor in self.data.items()}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def make(model: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    spec = SPECS[model][0]
    return build(spec, FACTS[model]), task_for(spec, FACTS[model])


def shoal_arm(group, model: str, precision: str, shards: int, sync: str) -> Iterator[None]:
    plan = Plan(mesh={"data": group.world}, sync=sync)
    worker = Worker(group, plan, shards=shards)
    net, task = make(model)
    called = worker.model(net)
    worker.optimizer(optimizer_of(net))
    for step in worker.steps(Synthetic(model), batch=SPECS[model][1], steps=10**6):
        with autocast(precision, worker.device):
            for batch in step:
                loss, count = task.loss(called, batch)
                step.backward(loss, count)
        step.commit()
        yield


def plain_arm(group, model: str, precision: str, *, ddp: bool) -> Iterator[None]:
    net, task = make(model)
    called = DistributedDataParallel(net) if ddp else net
    optimizer = optimizer_of(net)
    source, each = Synthetic(model), SPECS[model][1] // group.world
    for step in range(10**6):
        ids = (np.arange(each) + (step * group.world + group.rank) * each) % len(source)
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, torch.device("cpu")):
            loss, count = task.loss(called, source.fetch(ids, 0))
        (loss / count).backward()
        optimizer.step()
        yield


class OwnProcess:
    """The plain loop as anybody would run it: a Python process of its own, told when to step."""

    def __init__(self, model: str, precision: str) -> None:
        command = [sys.executable, __file__, "--serve-plain", "--model", model, "--precision", precision]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __next__(self) -> float:
        """One step; its CPU seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def serve_plain(model: str, precision: str) -> None:
    torch.set_num_threads(1)

    class Alone:
        rank, world = 0, 1

    arm = plain_arm(Alone(), model, precision, ddp=False)
    for _ in sys.stdin:
        used = time.process_time()
        next(arm)
        print(time.process_time() - used, flush=True)


def measure(group, model: str, precision: str, rounds: int, port: int) -> dict:
    arms: dict[str, Callable[[], Iterator[None]]] = {}
    if group.world == 1:
        arms["plain script"] = lambda: OwnProcess(model, precision)
        arms["plain inside"] = lambda: plain_arm(group, model, precision, ddp=False)
        arms["shoal 1 shard"] = lambda: shoal_arm(group, model, precision, 1, "exact")
    else:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=group.rank, world_size=group.world)
        arms["ddp"] = lambda: plain_arm(group, model, precision, ddp=True)
        arms["fast 2 shards"] = lambda: shoal_arm(group, model, precision, 2, "fast")
        for shards in (2, 4, 8):
            arms[f"exact {shards} shards"] = lambda shards=shards: shoal_arm(group, model, precision, shards, "exact")
    running = {name: arm() for name, arm in arms.items()}
    for arm in running.values():  # warm up: kernels, caches, buffers
        for _ in range(2):
            next(arm)
    wall: dict[str, list[float]] = {name: [] for name in running}
    cpu: dict[str, list[float]] = {name: [] for name in running}
    for name in turns(list(running), rounds):
        group.gather(b"")
        begun, used = time.perf_counter(), time.process_time()
        elsewhere = sum(next(running[name]) or 0.0 for _ in range(STEPS))
        group.gather(b"")
        wall[name].append((time.perf_counter() - begun) / STEPS)
        cpu[name].append((time.process_time() - used + elsewhere) / STEPS)
    for arm in running.values():
        arm.close()
    if group.world > 1:
        dist.destroy_process_group()
    return {"wall": wall, "cpu": cpu}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SPECS, default="gpt")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--serve-plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_plain:
        serve_plain(args.model, args.precision)
        return
    out: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "model": args.model,
        "precision": args.precision,
        "batch": SPECS[args.model][1],
        "parameters": sum(p.numel() for p in make(args.model)[0].parameters()),
        "load_average": os.getloadavg(),
        "arms": {},
    }
    print({key: out[key] for key in out if key != "arms"})
    with Agent(PRELOAD) as agent:
        for workers in args.workers:
            ranks = agent.run(measure, (args.model, args.precision, args.rounds, free_port()), workers=workers)
            control = "plain script" if workers == 1 else "ddp"
            walls = {n: [max(r["wall"][n][i] for r in ranks) for i in range(args.rounds)] for n in ranks[0]["wall"]}
            cpus = {n: [sum(r["cpu"][n][i] for r in ranks) for i in range(args.rounds)] for n in ranks[0]["cpu"]}
            for name in walls:
                ratios = [a / b for a, b in zip(walls[name], walls[control], strict=True)]
                cpu_ratios = [a / b for a, b in zip(cpus[name], cpus[control], strict=True)]
                row = {
                    "workers": workers,
                    "step_ms": statistics.median(walls[name]) * 1e3,
                    "ratio_of_medians": statistics.median(walls[name]) / statistics.median(walls[control]),
                    "median_of_ratios": statistics.median(ratios),
                    "cpu_ratio": statistics.median(cpu_ratios),
                    "wall": walls[name],
                    "cpu": cpus[name],
                }
                out["arms"][f"{workers} workers: {name}"] = row
                print(
                    f"{workers} workers  {name:16} {row['step_ms']:8.1f} ms   time of {control}: "
                    f"{row['ratio_of_medians']:.3f} (pairs {row['median_of_ratios']:.3f})   cpu {row['cpu_ratio']:.3f}"
                )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"data_parallel-{args.model}-{args.precision}.json"
    file.write_text(json.dumps(out, indent=1))
    print("raw numbers:", file)


if __name__ == "__main__":
    main()
