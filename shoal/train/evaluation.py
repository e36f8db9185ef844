"""Held-out figures, the same to the bit on any number of workers."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from shoal.comm.group import Group
from shoal.comm.status import Phase
from shoal.data.source import Batch, Source
from shoal.models.task import Task
from shoal.parallel.held import Held
from shoal.parallel.pipeline.engine import Pipeline
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
    replica, replicas = (held.replica, held.plan.replicas) if held else (group.rank, group.world)
    together = held is not None and held.experts is not None  # all replicas go along, also without a batch of their own
    pipeline = held.pipeline if held else None
    speaks = held is None or held.coordinates.get("tensor", 0) == 0  # along that axis all have the same sums

    def fetch(number: int) -> Batch:
        if number >= len(starts):
            return {name: tensor[:0] for name, tensor in fetch(0).items()}
        ids = np.arange(starts[number], min(starts[number] + size, count), dtype=np.int64)
        return {name: tensor.to(device) for name, tensor in source.fetch(ids, 0).items()}

    mine: dict[int, dict[str, float]] = {}
    with _evaluating(model, pipeline), torch.no_grad(), autocast(precision, device):
        for first in range(0, len(starts), replicas):
            number = first + replica
            if number >= len(starts) and not together:
                break
            group.report(Phase.evaluating)
            if pipeline is not None:
                sums = pipeline.measure(number, task, partial(fetch, number))
            else:
                sums = task.measure(model, fetch(number))
            if sums is not None and speaks and number < len(starts):  # along axis context each has its part of them
                mine[number] = {name: float(value) for name, value in sums.items()}
        if pipeline is not None:
            pipeline.settle()
    rows = [json.loads(row) for row in group.gather(json.dumps(mine).encode())]
    return task.summarise(_added([row[str(n)] for n in range(len(starts)) for row in rows if str(n) in row]))


@contextmanager
def _evaluating(model: nn.Module, pipeline: Pipeline | None) -> Iterator[None]:
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
