"""What the tensor axis of a plan sends in a run, layer by layer, before any worker starts."""

import re
from dataclasses import replace

import torch

from shoal.data.source import Source
from shoal.models.registry import outline, task_for
from shoal.parallel.layout.decide import layout_for
from shoal.parallel.layout.explain import Sending, explain
from shoal.parallel.pipeline.head_and_tail import arguments_of
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe


def explain_run(recipe: Recipe, plan: Plan, source: Source) -> list[Sending]:
    """For one micro-batch of the recipe; nothing is allocated for the model. Raises UserError for an illegal layout."""
    model = outline(recipe.model, source.facts)
    layout = layout_for(model, plan)
    batch = source.fetch(torch.arange(min(recipe.samples_of_micro_batch, len(source))).numpy(), 0)
    given = arguments_of(task_for(recipe.model, source.facts).loss, model, batch)
    at = given.pop("at", None)  # where a masked language model has targets
    targets = 1.0 if at is None else float(at.float().mean())
    return explain(model, layout, given, itemsize=2 if recipe.precision == "bfloat16" else 4, targets=targets)


def grouped(rows: list[Sending]) -> list[tuple[int, Sending]]:
    """(how many, one of them): layers that differ by their number only, and send alike, are one row."""
    found: dict[Sending, int] = {}
    for row in rows:
        alike = replace(row, layer=re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.layer))
        found[alike] = found.get(alike, 0) + 1
    return [(count, row) for row, count in found.items()]
