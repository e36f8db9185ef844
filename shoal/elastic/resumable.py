"""What of a user's own code cannot be gone on with: asked for the same thing twice, it gives two answers.

A new worker has the weights, the buffers and the place in the data, and nothing else: a model whose loss depends on how
often it was called, or a data set whose sample does, is another one in a new process."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.group import Group
from shoal.data.dataset import DatasetSource
from shoal.data.ledger import Ledger
from shoal.data.source import Source
from shoal.models.registry import task_for
from shoal.train.first_model import made_model
from shoal.train.loop import Order, open_splits
from shoal.train.streams import enter_stream

MOST_NAMED = 3  # attributes in one line
INSIDE, DEEPEST = ("dataset", "source"), 5  # what wrappers call what they wrap
LONGEST = 40  # characters of a value


def not_resumable(group: Group, order: Order) -> list[str]:
    """A line for the data, and one for the model, where they give other numbers the second time."""
    recipe = order.recipe
    splits = open_splits(group, order)
    source: Source = splits.train if hasattr(splits.train, "fetch") else DatasetSource(splits.train)
    ids = Ledger(len(source), recipe.batch, recipe.shards, recipe.micro_batches, recipe.seed).shard(0, 0)[0]
    found = []
    before = _of_data(source)
    first, second = source.fetch(ids, 0), source.fetch(ids, 0)
    if (name := next((n for n, tensor in first.items() if not _same(tensor, second[n])), None)) is not None:
        after = _of_data(source)
        found.append(f"the data set gives another {name!r} for the same samples, asked again{_named(before, after)}")
    model = made_model(order, splits)
    task = task_for(recipe.model, splits.train.facts)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kept = _of_model(model)
    losses = []
    for _ in range(2):
        model.load_state_dict(state)
        enter_stream(recipe.seed, 0, 0, 0)
        with torch.no_grad():
            losses.append(task.loss(model, first)[0])
    if not _same(*losses):
        found.append(f"the model gives another loss for the same weights and batch{_named(kept, _of_model(model))}")
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool((one.isnan() == other.isnan()).all() and one.isnan().all())


def _of_data(source: Any) -> dict[str, str]:
    """Of the source, and of what lies inside: a part of a data set, and the user's own."""
    found: dict[str, str] = {}
    inside = [source]
    for thing in inside:
        found |= _kept("the data set", thing)
        inner = [value for key, value in getattr(thing, "__dict__", {}).items() if key.strip("_") in INSIDE]
        inside += [value for value in inner if hasattr(value, "__dict__") and len(inside) < DEEPEST]
    return found


def _of_model(model: nn.Module) -> dict[str, str]:
    parts = [_kept(name or "the model", part) for name, part in model.named_modules()]
    return {key: value for part in parts for key, value in part.items()}


def _kept(name: str, thing: Any) -> dict[str, str]:
    """What an object keeps in its attributes, as far as it can be told."""
    return {f"{key!r} of {name}": told for key, told in _told(getattr(thing, "__dict__", {}))}


def _told(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, bool | int | float | str | tuple | list | dict | set):
            yield key, repr(value)[:LONGEST]
        elif isinstance(value, torch.Generator):
            yield key, f"a generator at {hash(value.get_state().numpy().tobytes()) & 0xFFFF:04x}"
        elif isinstance(value, random.Random):
            yield key, f"a generator at {hash(value.getstate()) & 0xFFFF:04x}"


def _named(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    changed = [key for key in after if before.get(key) != after[key]][:MOST_NAMED]
    return ": " + ", ".join(f"{key} was {before.get(key)} and is {after[key]}" for key in changed) if changed else ""
