"""A run's model before its first step: whole, or without memory for those who hold a part of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shoal.comm.group import Group, HostGroup
from shoal.comm.shared_weights import SharedWeights
from shoal.data.source import Splits
from shoal.models.first_values import FirstValues, blank, materialise
from shoal.models.registry import build, build_blank
from shoal.parallel.building import shared_from_the_start
from shoal.parallel.held import Held
from shoal.recipe.plan import Plan
from shoal.train.gradients import Gradients

if TYPE_CHECKING:
    from shoal.train.loop import Order


def made_model(order: "Order", splits: Splits) -> nn.Module:
    """The whole model with its first weights."""
    torch.manual_seed(order.recipe.seed)
    return order.model() if order.model else build(order.recipe.model, splits.train.facts)


def model_to_place(order: "Order", splits: Splits, *, parts: bool) -> tuple[nn.Module, FirstValues | None]:
    """For `Worker.model`: with ``parts``, the model without memory, and its first values, if it says them."""
    torch.manual_seed(order.recipe.seed)
    if parts:
        found = blank(order.model) if order.model else build_blank(order.recipe.model, splits.train.facts)
        if found is not None:
            return found.module, found.first
    return made_model(order, splits), None


def model_with(weights: Mapping[str, Tensor], order: "Order", splits: Splits) -> nn.Module:
    """The whole model with these weights, by name, which become its own: there is no second copy of them."""
    model, first = model_to_place(order, splits, parts=True)
    own = model.state_dict(keep_vars=True)
    model.load_state_dict({name: t.to(own[name].dtype) for name, t in weights.items()}, strict=False, assign=True)
    if first is not None:
        materialise([model], first)  # buffers that no checkpoint has
    return model


def in_shared_memory(plan: Plan, group: Group, device: torch.device) -> bool:
    """Whether parameters are made where workers share them: each makes some, and nobody has memory for all of them."""
    return shared_from_the_start(plan) and isinstance(group, HostGroup) and device.type == "cpu"


def share_first_values(held: Held, gradients: Gradients) -> None:
    """Give the parameters of a model that is not split their memory and first values. Called by all workers."""
    first, group = held.first, held.group
    assert first is not None
    assert isinstance(group, HostGroup)
    names = {id(parameter): name for name, parameter in held.module.named_parameters()}
    frozen = [parameter for parameter in held.module.parameters() if not parameter.requires_grad]
    held.shared = SharedWeights(
        group, gradients.layout, gradients.parameters, frozen, values=lambda p: first.passing(names[id(p)])
    )
