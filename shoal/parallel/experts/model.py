"""Cut the experts of a model for the workers of a group, in place: parameters keep their names."""

from collections.abc import Mapping

from torch import nn

from shoal.comm.tensors import Collectives
from shoal.errors import UserError
from shoal.models.moe import Experts
from shoal.parallel.experts.travel import ExpertsElsewhere
from shoal.parallel.layout.split import Split, even_split
from shoal.parallel.tensor.apply import cut_tensors


def experts_split(model: nn.Module, ways: int) -> dict[str, Split]:
    """How each parameter of experts is cut over ``ways`` workers: whole experts, as evenly as that goes.

    Raises UserError for a model without experts, and for fewer experts than workers."""
    found: dict[str, Split] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            experts = len(module.up.weight)
            if experts < ways:
                raise UserError(
                    f"{name} has {experts} experts, fewer than the {ways} workers of mesh axis 'expert': "
                    f"use expert = {experts} at most, or model.experts = {ways}."
                )
            split = even_split(0, "expert", experts, ways)
            found |= {f"{name}.{key}": split for key, _ in module.named_parameters()}
    if not found:
        raise UserError(
            f"mesh axis 'expert' = {ways} splits nothing: a {type(model).__name__} has no experts, a model of kind "
            f"'moe' has. Use axis 'data' instead."
        )
    return found


def split_experts(model: nn.Module, splits: Mapping[str, Split], collectives: Collectives) -> None:
    """Keep this worker's experts alone; the others' are reached through the group. ``splits``: see `experts_split`.

    ``model`` may be a part of the model that they are for, with the same names: a stage of a pipeline. From now on all
    workers of the group call it together, each with its own samples; none at all will do."""
    cut_tensors(model, splits, collectives.rank)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            split = splits[f"{name}.up.weight"]
            module.forward = ExpertsElsewhere(module, split, collectives)  # type: ignore[method-assign]
