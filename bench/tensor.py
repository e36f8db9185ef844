"""A stack of GPT blocks split over two workers: Shoal's tensor parallelism beside DTensor's parallelize_module on gloo.

    python bench/tensor.py [--rounds 15] [--runs 3] [--quick]

Both arms live in the same two processes and take turns, in an order that rotates: forward pass, backward pass and SGD
step on the same weights and the same input, one thread a worker. Both are Megatron's layout: qkv and up by columns, out
and down by rows; the control's rows of qkv are put in the workers' order first, so that it computes the same (checked).
A third arm leaves communication out: what the rest of Shoal's step takes. Ratios are medians over rounds of the slower
worker's time in the same round. Bytes sent in a step are counted and stand beside the formula of the layout.
Goals: a step takes at most as long as DTensor's; bytes equal to the formula. Raw numbers to bench/results/tensor.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from turns import turns

from shoal.comm.launch import Agent
from shoal.comm.tensors import make_collectives
from shoal.models.dimensions import Dimensions, Grain, name_dimensions
from shoal.models.gpt import DIMENSIONS, Block, GPTConfig, head_grains
from shoal.parallel.layout.decide import layout_of
from shoal.parallel.layout.explain import explain
from shoal.parallel.tensor.apply import split_model

RESULTS = Path(__file__).parent / "results"
SIZES = {  # layers, heads, width, samples, tokens
    "512": (4, 8, 512, 4, 128),
    "256": (4, 8, 256, 4, 128),
    "tiny": (1, 2, 16, 2, 8),
}
SHOAL, CONTROL, ALONE = "shoal", "dtensor over gloo", "no communication"


class Stack(nn.Module):
    def __init__(self, size: str) -> None:
        super().__init__()
        layers, heads, self.width, self.samples, self.tokens = SIZES[size]
        config = GPTConfig(layers=layers, heads=heads, width=self.width)
        self.head_size = self.width // heads
        self.blocks = nn.ModuleList(Block(config) for _ in range(layers))
        self.before = nn.Linear(self.width, self.width)  # so that the first block's input has a gradient

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return x

    def example(self) -> Tensor:
        return torch.randn(self.samples, self.tokens, self.width, generator=torch.Generator().manual_seed(1))

    def dimensions(self) -> Dimensions:
        return name_dimensions(self, {"before.weight": ("width", "input"), "before.bias": ("width",), **DIMENSIONS})

    def grains(self) -> dict[str, Grain]:
        return head_grains(self.head_size)


class Silent:
    """Collectives that send nothing: the rest of the step, with wrong sums."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def all_reduce(self, t: Tensor) -> Tensor:
        return t.clone(memory_format=torch.contiguous_format)


def stack(size: str) -> Stack:
    torch.manual_seed(0)
    return Stack(size)


def with_dtensor(size: str, workers: int) -> Stack:
    model = stack(size)
    layout = layout_of(model, model.dimensions(), {}, workers)
    plan = {}
    with torch.no_grad():
        for name in [n for n, m in model.named_modules() if isinstance(m, Block)]:
            for key in ("weight", "bias"):
                full = f"{name}.attention.qkv.{key}"
                parameter = model.get_parameter(full)
                parameter.copy_(layout.splits[full].grouped(parameter))
            plan |= {f"{name}.attention.qkv": ColwiseParallel(), f"{name}.up": ColwiseParallel()}
            plan |= {f"{name}.attention.out": RowwiseParallel(), f"{name}.down": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (workers,)), plan)
    return model


def arm(model: Stack) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = model.example()

    def step() -> Tensor:
        optimizer.zero_grad()
        out = model(x)
        out.square().mean().backward()
        optimizer.step()
        return out.detach()

    return step


def measure(group, size: str, rounds: int, steps: int, file: str) -> dict:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=group.rank, world_size=group.world)
    models = {SHOAL: stack(size), ALONE: stack(size)}
    layout = layout_of(models[SHOAL], models[SHOAL].dimensions(), {}, group.world)
    split_model(models[SHOAL], layout, make_collectives(group))
    split_model(models[ALONE], layout, Silent(group.rank, group.world))
    models[CONTROL] = with_dtensor(size, group.world)
    arms = {name: arm(model) for name, model in models.items()}
    outs = {name: step() for name, step in arms.items()}
    torch.testing.assert_close(outs[SHOAL], outs[CONTROL], rtol=1e-4, atol=1e-5)
    before = sent(group)
    arms[SHOAL]()
    counted = sent(group) - before
    for step in arms.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for name in turns(list(arms), rounds):
        group.gather(b"")
        begun = time.perf_counter()
        for _ in range(steps):
            arms[name]()
        seconds[name].append((time.perf_counter() - begun) / steps)
    dist.destroy_process_group()
    return {"seconds": seconds, "sent_bytes": counted}


def sent(group) -> float:
    return sum(t.sent_bytes for (name, _), t in group.counters.totals().items() if name != "gather")


def summary(ranks: list[dict]) -> dict:
    """The slower worker's time of each round; ratios within a round."""
    rounds = range(len(ranks[0]["seconds"][SHOAL]))
    slower = {name: [max(rank["seconds"][name][i] for rank in ranks) for i in rounds] for name in ranks[0]["seconds"]}

    def ratio(of: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(slower[of], slower[to], strict=True))

    return {
        "step_ms": {name: statistics.median(times) * 1e3 for name, times in slower.items()},
        "against_dtensor": ratio(SHOAL, CONTROL),
        "against_no_communication": ratio(SHOAL, ALONE),
        "sent_bytes": [rank["sent_bytes"] for rank in ranks],
        "seconds": slower,
    }


def formula_bytes(size: str) -> float:
    """What each worker sends in a step."""
    model = stack(size)
    layout = layout_of(model, model.dimensions(), {}, 2)
    return sum(row.bytes for row in explain(model, layout, [model.example()]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each arm in a round")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs; saves nothing")
    args = parser.parse_args()
    out: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
        "sizes": {},
    }
    with Agent() as agent, tempfile.TemporaryDirectory() as folder:
        for size in ("tiny",) if args.quick else ("512", "256"):
            runs = [
                summary(agent.run(measure, (size, args.rounds, args.steps, f"{folder}/{size}{run}"), workers=2))
                for run in range(args.runs)
            ]
            keys = ("against_dtensor", "against_no_communication")
            median = {key: statistics.median(run[key] for run in runs) for key in keys}
            row = {"layers, heads, width, samples, tokens": SIZES[size], "median": median, "runs": runs}
            out["sizes"][size] = row | {"formula_bytes": formula_bytes(size)}
            milliseconds = ", ".join(f"{name} {ms:.1f} ms" for name, ms in runs[0]["step_ms"].items())
            print(
                f"width {size:>4}: {median['against_dtensor']:.2f} of dtensor's step, "
                f"{median['against_no_communication']:.2f} of no communication ({milliseconds}); "
                f"each worker sends {runs[0]['sent_bytes']} B, formula {out['sizes'][size]['formula_bytes']:.0f} B"
            )
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "tensor.json").write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
