"""Whether a plan can split a recipe's model: looked at without its weights, before any worker starts."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from shoal.data.ledger import Ledger
from shoal.data.registry import open_data
from shoal.errors import UserError, unknown_name
from shoal.models.first_values import FirstValues, blank
from shoal.models.on_meta import on_meta
from shoal.models.registry import build_blank, outline
from shoal.parallel.building import check_room
from shoal.parallel.context.model import check_sequence
from shoal.parallel.experts.model import experts_split
from shoal.parallel.layout.decide import layout_for
from shoal.parallel.schedules import make_schedule, verify
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe


def check_split(
    recipe: Recipe, plan: Plan, model: Callable[[], nn.Module] | None, data: Any, *, room: int | None = None
) -> None:
    """Raises UserError, with the repair, for rules, cuts, experts and schedules that cannot be, and for models that
    cannot be built in ``room`` bytes, the memory of a host that all workers are on."""
    splits = open_data(recipe.data, recipe.seed, data)
    if len(splits.train) == 0:
        return  # which is said by those who read it
    module, first = without_memory(recipe, model, splits.train.facts)
    if room is not None:
        check_room(module, plan, first, room)
    layout_for(module, plan)
    if plan.axes.size("expert") > 1:
        experts_split(module, plan.axes.size("expert"))
    if plan.axes.size("context") > 1:
        check_sequence(module)
    if plan.axes.size("pipe") > 1:
        _check_pipeline(recipe, plan, module, len(splits.train))


def without_memory(
    recipe: Recipe, model: Callable[[], nn.Module] | None, facts: Mapping[str, Any]
) -> tuple[nn.Module, FirstValues | None]:
    """The model on the meta device, and its first values if it says them. ``model`` stands in for the recipe's."""
    found = blank(model) if model is not None else build_blank(recipe.model, facts)
    if found is not None:
        return found.module, found.first
    if model is None:
        return outline(recipe.model, facts), None
    with on_meta():
        return model(), None


def _check_pipeline(recipe: Recipe, plan: Plan, module: nn.Module, samples: int) -> None:
    ledger = Ledger(samples, recipe.batch, recipe.shards, recipe.micro_batches, recipe.seed)
    pipeline, size = plan.pipeline, plan.axes.size("pipe")
    last = ledger.steps_per_epoch - 1
    steps = {0, last} if last < (recipe.steps or last + 1) else {0}
    counts = {sum(ledger.passes(step)[shard] for shard in owned)
              for step in steps for owned in plan.owned(recipe.shards)} - {0}  # fmt: skip
    chunks = 0
    for count in sorted(counts):
        made = make_schedule(pipeline.schedule, size, count, pipeline.chunks)
        verify(made)
        chunks = made.chunks
    known = {name for name, _ in (*module.named_modules(), *module.named_parameters())} - {""}
    for cut in pipeline.cuts:
        if cut not in known:
            raise unknown_name("cut point", cut, known, "plan.pipeline.cuts")
    if pipeline.cuts and len(pipeline.cuts) != chunks - 1:
        raise UserError(
            f"plan: {chunks} chunks have {chunks - 1} cuts between them, and pipeline.cuts names {len(pipeline.cuts)}."
        )
