"""Pipelines of two stages on two cores, beside two independent workers and torch.distributed.pipelining over gloo.

    python bench/pipeline.py [--rounds 7] [--micro-batches 8] [--quick]

A GPT of 11 million parameters, forward and backward passes of a step without an update. All arms live in the same two
processes and take turns: a round runs each of them once, in an order that rotates. The control is the same two
processes, each with the whole model, at the same time: what two cores do when nothing is split. An arm's share is its
throughput over the control's, and the goal is 0.90 of one minus the schedule's bubble; the other goal is to be no
slower than torch.distributed.pipelining's own schedule, over the same chunks, in the same round.
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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from turns import turns

from shoal.comm.launch import Agent
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.tasks.language_model import LanguageModel
from shoal.parallel.partition.chunks import Chunks
from shoal.parallel.partition.cut import cut
from shoal.parallel.pipeline.engine import Pipeline
from shoal.parallel.schedules import make_schedule
from shoal.parallel.schedules.simulation import simulate

RESULTS = Path(__file__).parent / "results"
SIZES = {"11M": (8, 336, 64, 4), "tiny": (4, 32, 16, 2)}  # layers, width, tokens of a sample, samples of a micro-batch
VOCAB = 256
CONTROL = "two whole models"
ARMS = {  # our schedule: chunks of a worker, torch's schedule
    "gpipe": (1, "ScheduleGPipe"),
    "1f1b": (1, "Schedule1F1B"),
    "zb-h1": (1, "ScheduleInterleavedZeroBubble"),
    "interleaved": (2, "ScheduleInterleaved1F1B"),
    "zb-v": (2, "ScheduleZBVZeroBubble"),
}
TASK = LanguageModel()


def model(size: str) -> GPT:
    layers, width, context, _ = SIZES[size]
    torch.manual_seed(0)
    return GPT(GPTConfig(layers=layers, heads=4, width=width, context=context, vocab=VOCAB, tied=False))


def batches(size: str, count: int) -> list[dict[str, Tensor]]:
    _, _, context, samples = SIZES[size]
    generator = torch.Generator().manual_seed(1)
    return [{"tokens": torch.randint(VOCAB, (samples, context + 1), generator=generator)} for _ in range(count)]


def in_chunks(net: GPT, count: int, data: list[dict[str, Tensor]]) -> Chunks:
    """As many layers in each: one tensor crosses a cut, which is all that torch.distributed.pipelining takes here."""
    each = net.config.layers // count
    cuts = [f"blocks.{number * each}" for number in range(1, count)]
    return cut(net, count, example={"tokens": data[0]["tokens"][:, :-1]}, cuts=cuts)


class Accumulating:
    """A step whose gradients add up where autograd puts them, as in the other arms."""

    def __init__(self, data: list[dict[str, Tensor]]) -> None:
        self._data = data
        self.loss = 0.0

    def batch(self, micro_batch: int) -> dict[str, Tensor]:
        return self._data[micro_batch]

    def enter_stream(self, micro_batch: int) -> None: ...
    def enter(self, chunk: int, micro_batch: int) -> None: ...
    def left(self, chunk: int, micro_batch: int) -> None: ...
    def counted(self, micro_batch: int, value: float, count: float) -> None: ...

    def backward(self, chunk: int, micro_batch: int, run: Callable[[], None], value: float, count: float) -> None:
        if not chunk:
            self.loss += value
        run()


def whole_arm(size: str, data: list[dict[str, Tensor]]) -> Callable[[], float]:
    net = model(size)

    def step() -> float:
        net.zero_grad(set_to_none=True)
        total = 0.0
        for batch in data:
            loss, _ = TASK.loss(net, batch)
            loss.backward()
            total += loss.item()
        return total

    return step


def shoal_arm(group: Any, size: str, data: list[dict[str, Tensor]], name: str) -> Callable[[], float]:
    schedule, net = make_schedule(name, group.world, len(data), ARMS[name][0]), model(size)
    chunks = in_chunks(net, schedule.chunks, data)
    pipeline = Pipeline(group, chunks, schedule.placement, net, torch.device("cpu"))

    def step() -> float:
        net.zero_grad(set_to_none=True)
        work = Accumulating(data)
        figures = pipeline.step(schedule, TASK, work)
        assert figures.peak == pipeline.predicted_peak(schedule)
        return work.loss

    return step


class OneTensor(nn.Module):
    """A chunk as torch.distributed.pipelining takes it."""

    def __init__(self, chunk: Any) -> None:
        super().__init__()
        self.module, (self._input,) = chunk.module, chunk.inputs or chunk.batch_inputs
        (self._output,) = chunk.outputs

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.module({self._input: x})[self._output]
        return made


def torch_arm(group: Any, size: str, data: list[dict[str, Tensor]], name: str) -> Callable[[], float]:
    net = model(size)
    each, kind = ARMS[name]
    schedule = make_schedule(name, group.world, len(data), each)
    chunks = in_chunks(net, schedule.chunks, data)
    device = torch.device("cpu")
    stages = [
        PipelineStage(OneTensor(chunks.chunks[number]), number, len(chunks), device)
        for number in schedule.chunks_of(group.rank)
    ]
    tokens = torch.cat([batch["tokens"] for batch in data])

    def loss_of(logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), target.reshape(-1), reduction="sum")

    made_of = getattr(schedules, kind)
    single = kind in ("ScheduleGPipe", "Schedule1F1B")
    run = made_of(stages[0] if single else stages, len(data), loss_fn=loss_of, scale_grads=False)
    first, last = 0 in schedule.chunks_of(group.rank), len(chunks) - 1 in schedule.chunks_of(group.rank)

    def step() -> float:
        net.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        given = (tokens[:, :-1],) if first else ()
        target = {"target": tokens[:, 1:], "losses": losses} if last else {}
        run.step(*given, **target, return_outputs=False)
        return float(sum(loss.item() for loss in losses))

    return step


def measure(group: Any, size: str, rounds: int, micro_batches: int, file: str) -> dict[str, Any]:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=group.rank, world_size=group.world)
    data = batches(size, micro_batches)
    arms: dict[str, Callable[[], float]] = {CONTROL: whole_arm(size, data)}
    for name in ARMS:
        arms[f"shoal {name}"] = shoal_arm(group, size, data, name)
        arms[f"torch {name}"] = torch_arm(group, size, data, name)
    losses = {}
    for name, step in arms.items():
        step()
        losses[name] = step()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for name in turns(list(arms), rounds):
        group.gather(b"")
        begun = time.perf_counter()
        arms[name]()
        group.gather(b"")
        seconds[name].append(time.perf_counter() - begun)
    dist.destroy_process_group()
    return {"seconds": seconds, "losses": losses}


def summary(ranks: list[dict[str, Any]], micro_batches: int) -> dict[str, Any]:
    """The slower worker's time of each round; shares and ratios of the same round."""
    times = {
        name: [max(pair) for pair in zip(*(rank["seconds"][name] for rank in ranks), strict=True)]
        for name in ranks[0]["seconds"]
    }
    out: dict[str, Any] = {CONTROL: {"seconds": statistics.median(times[CONTROL])}}
    for name, (each, _) in ARMS.items():
        kept = 1 - simulate(make_schedule(name, 2, micro_batches, each)).bubble
        ours, theirs = times[f"shoal {name}"], times[f"torch {name}"]
        # the control does every micro-batch twice in its time
        share = statistics.median(c / (2 * t) for c, t in zip(times[CONTROL], ours, strict=True))
        out[name] = {
            "seconds": statistics.median(ours),
            "torch_seconds": statistics.median(theirs),
            "share_of_two_whole_models": share,
            "one_minus_bubble": kept,
            "share_of_what_the_bubble_leaves": share / kept,
            "over_torch": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether it runs, not how fast")
    args = parser.parse_args()
    size = "tiny" if args.quick else "11M"
    rounds = 2 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as folder, Agent() as agent:
        ranks = agent.run(measure, (size, rounds, args.micro_batches, f"{folder}/meet"), workers=2)
    told = summary(ranks, args.micro_batches)
    print(f"{CONTROL}: {told[CONTROL]['seconds'] * 1e3:.0f} ms for {args.micro_batches} micro-batches on each core")
    for name in ARMS:
        t = told[name]
        print(
            f"{name:12} {t['seconds'] * 1e3:6.0f} ms, {t['share_of_what_the_bubble_leaves']:.3f} of what the bubble "
            f"leaves (goal 0.90); torch {t['torch_seconds'] * 1e3:.0f} ms, ratio {t['over_torch']:.3f} (goal at most 1)"
        )
    for name, loss in ranks[0]["losses"].items():
        if name.startswith("shoal") and loss != ranks[0]["losses"][CONTROL]:
            raise SystemExit(f"{name} has another loss than one process: {loss} and {ranks[0]['losses'][CONTROL]}")
    if args.quick:
        return
    record = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model(size).parameters()),
        "micro_batches": args.micro_batches,
        "summary": told,
        "ranks": ranks,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pipeline.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
