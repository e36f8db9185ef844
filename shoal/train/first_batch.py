"""What is tried out on the run's first micro-batch before the first step: how a model is cut, what a pass needs."""

from functools import partial

import torch
from torch import nn

from shoal.data.ledger import Ledger
from shoal.data.source import Batch, Splits
from shoal.models.first_values import FirstValues
from shoal.models.task import Task
from shoal.parallel.place import Subject
from shoal.recipe.recipe import Recipe
from shoal.train.precision import autocast
from shoal.train.streams import enter_stream
from shoal.train.worker import Worker


def subject_of(
    recipe: Recipe, splits: Splits, task: Task, device: torch.device, first: FirstValues | None = None
) -> Subject:
    ledger = Ledger(len(splits.train), recipe.batch, recipe.shards, recipe.micro_batches, recipe.seed)
    fetched = splits.train.fetch(ledger.shard(0, 0)[0], 0)
    batch = {name: tensor.to(device) for name, tensor in fetched.items()}
    return Subject(task, batch, None if first is None else first.on(device))


def prepare_memory(worker: Worker, recipe: Recipe, splits: Splits, task: Task, model: nn.Module) -> None:
    def loss(batch: Batch) -> torch.Tensor:
        enter_stream(recipe.seed, 0, worker.shards[0], 0)
        with autocast(recipe.precision, worker.device):
            return task.loss(model, batch)[0]

    around = partial(autocast, recipe.precision, worker.device)
    worker.prepare_memory(splits.train, recipe.batch, loss, saves=True, within=around)
