"""A task made of the user's own loss function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.data.source import Batch
from shoal.errors import UserError
from shoal.models.tasks.cross_entropy import mean

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, int]]


@dataclass(frozen=True)
class CustomLoss:
    """``function(model, batch)`` gives (scalar sum of the losses, number of targets).

    Raises UserError when it gives anything else: a mean alone could not be added up over shards."""

    function: LossFunction
    reference: str  # how the user names it, for the errors
    name: str = "custom"
    unit: str = "samples"
    best: tuple[str, Literal["min", "max"]] = ("loss", "min")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        given = self.function(model, batch)
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor) and given[0].dim() == 0):
            raise UserError(
                f"{self.reference} must return (sum of the losses as a scalar tensor, number of targets), "
                f"it returned {_describe(given)}."
            )
        return given[0], int(given[1])

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        loss, count = self.loss(model, batch)
        return {"loss": loss.item(), "count": count}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": mean(sums, "loss")}


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(_describe(item) for item in value)})"
    return type(value).__name__
