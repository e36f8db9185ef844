"""Held-out figures, the same to the bit on any number of workers."""

import json
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from shoal.comm.group import Group
from shoal.comm.status import Phase
from shoal.data.source import Source
from shoal.models.task import Task
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
) -> dict[str, float]:
    """The task's figures over the first ``samples`` (0: all) of a source.

    Batches have a fixed shape and are dealt out to the workers; their sums are added in batch order on all of them."""
    count = min(samples or len(source), len(source))
    size = min(batch, LARGEST_BATCH)
    starts = range(0, count, size)
    mine: dict[int, dict[str, float]] = {}
    training = model.training
    model.eval()
    try:
        for number in range(group.rank, len(starts), group.world):
            group.report(Phase.evaluating)
            ids = np.arange(starts[number], min(starts[number] + size, count), dtype=np.int64)
            fetched = {name: tensor.to(device) for name, tensor in source.fetch(ids, 0).items()}
            with torch.no_grad(), autocast(precision, device):
                mine[number] = {name: float(value) for name, value in task.measure(model, fetched).items()}
    finally:
        model.train(training)
    rows = [json.loads(row) for row in group.gather(json.dumps(mine).encode())]
    return task.summarise(_added([row[str(n)] for n in range(len(starts)) for row in rows if str(n) in row]))


def _added(batches: list[Mapping[str, float]]) -> dict[str, float]:
    names = batches[0] if batches else {}
    return {name: math.fsum(sums[name] for sums in batches) for name in names}
