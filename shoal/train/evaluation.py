"""Held-out figures, the same to the bit on any number of workers."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from shoal.comm.group import Group
from shoal.comm.status import Phase
from shoal.data.source import Batch, Source
from shoal.models.task import Task
from shoal.parallel.held import Held
from shoal.train.precision import autocast

LARGEST_BATCH = 256


def evaluate(
    group: Group,
    model: nn.Module,
    task: Task,
    source: Source,
    *,
    batch: int,
    precision: str,
    device: torch.device,
    samples: int = 0,
    held: Held | None = None,
) -> dict[str, float]:
    """The task's figures over the first ``samples`` (0: all) of a source.

    Batches have a fixed shape and are dealt out to the workers, or to the replicas of a model that is split over them
    (``held``); their sums are added in batch order on all of them."""
    count = min(samples or len(source), len(source))
    size = min(batch, LARGEST_BATCH)
    starts = range(0, count, size)
    split = held is not None and held.plan.splits_model
    replica, replicas = (held.replica, held.plan.replicas) if held and split else (group.rank, group.world)
    rounds = range(replica, len(starts), replicas)
    if held is not None and held.experts is not None:  # all replicas go along, also without a batch of their own
        rounds = range(replica, -(-len(starts) // replicas) * replicas, replicas)
    mine: dict[int, dict[str, float]] = {}
    with _evaluating(model, held), torch.no_grad(), autocast(precision, device):
        for number in rounds:
            group.report(Phase.evaluating)

            def fetch(number: int = number) -> Batch:
                start = starts[number] if number < len(starts) else 0
                ids = np.arange(start, min(start + size, count), dtype=np.int64)
                fetched = source.fetch(ids, 0) if number < len(starts) else source.fetch(ids[:1], 0)
                return {k: (t if number < len(starts) else t[:0]).to(device) for k, t in fetched.items()}

            pipeline = held.pipeline if held is not None else None
            sums = pipeline.measure(number, task, fetch) if pipeline else task.measure(model, fetch())
            # along axis tensor all have the same sums, along axis context each has its part
            if sums is not None and number < len(starts) and (held is None or not held.coordinates.get("tensor", 0)):
                mine[number] = {name: float(value) for name, value in sums.items()}
        if held is not None and held.pipeline is not None:
            held.pipeline.settle()
    rows = [json.loads(row) for row in group.gather(json.dumps(mine).encode())]
    return task.summarise(_added([row[str(n)] for n in range(len(starts)) for row in rows if str(n) in row]))


@contextmanager
def _evaluating(model: nn.Module, held: Held | None) -> Iterator[None]:
    pipeline = held.pipeline if held is not None else None
    modules = [model, *(stage.chunk.module for stage in pipeline.stages.values())] if pipeline else [model]
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, before in zip(modules, training, strict=True):
            module.train(before)


def _added(batches: list[Mapping[str, float]]) -> dict[str, float]:
    names = batches[0] if batches else {}
    return {name: math.fsum(sums[name] for sums in batches) for name in names}
