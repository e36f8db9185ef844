"""What building a run's model takes of each worker's memory, before any worker starts."""

import torch

from shoal.cluster.detect import memory_bytes
from shoal.data.registry import open_data
from shoal.models.registry import build_blank, outline, task_for
from shoal.parallel.building import Building, building, check_room, why_whole
from shoal.parallel.pipeline.head_and_tail import arguments_of
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe


def building_run(recipe: Recipe, plan: Plan) -> tuple[tuple[Building, ...], str]:
    """By rank; and why each worker builds the whole model, "" where it builds its part.

    Raises UserError for an illegal layout, and for a model that this host has too little memory to build."""
    source = open_data(recipe.data, recipe.seed).train
    found = build_blank(recipe.model, source.facts)
    model, first = (found.module, found.first) if found is not None else (outline(recipe.model, source.facts), None)
    check_room(model, plan, first, memory_bytes())
    batch = source.fetch(torch.arange(min(recipe.samples_of_micro_batch, len(source))).numpy(), 0)
    example = arguments_of(task_for(recipe.model, source.facts).loss, model, batch)
    return building(model, plan, first, example), why_whole(plan, first)
