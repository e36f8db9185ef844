"""Where a chunk's graph begins and ends: what comes in has no history, and its gradients are caught as they are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from shoal.parallel.partition.recorded import substitute


def rebuilt(structure: Any, replace: Callable[[Any], Any]) -> Any:
    """As `substitute`, into what torch.max and the like return too."""

    def each(value: Any) -> Any:
        named = type(value).__module__ == "torch.return_types"
        return type(value)([rebuilt(item, replace) for item in value]) if named else replace(value)

    return substitute(structure, each)


class _Entry(torch.autograd.Function):
    """No parameter of a leaf: autograd would lay a leaf's gradient out anew, and the chunk before would sum it in
    another order than in one process."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, entered: "Entered") -> tuple[Tensor, ...]:
        ctx.entered = entered
        ctx.set_materialize_grads(False)
        return tuple(entered.tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        ctx.entered.gradients = list(gradients)
        return None, None


class Entered:
    """The tensors among a chunk's inputs that require a gradient, and the gradients once a backward pass came by."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.gradients: list[Tensor | None] = [None] * len(tensors)
        self.anchor = torch.empty(0, requires_grad=True)  # what makes autograd keep a graph

    def enter(self) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = _Entry.apply(self.anchor, self) if self.tensors else ()  # type: ignore[no-untyped-call]
        self.tensors = []
        return found


def trained(values: Any) -> list[Tensor]:
    """The tensors in nested values that require a gradient, in order: the same on both sides of a cut."""
    found: list[Tensor] = []
    rebuilt(values, lambda a: found.append(a) if isinstance(a, Tensor) and a.requires_grad else None)
    return found


def enter(values: dict[str, Any]) -> tuple[dict[str, Any], Entered]:
    """The values of a message as a chunk takes them, and what will have their gradients."""
    entered = Entered(trained(values))
    fresh = iter(entered.enter())
    return {
        name: rebuilt(value, lambda a: next(fresh) if isinstance(a, Tensor) and a.requires_grad else a)
        for name, value in values.items()
    }, entered


def edges(values: Any) -> list[GradientEdge]:
    """Where the gradients of `trained` values go in: edges keep a graph alive, but not what it has made."""
    return [get_gradient_edge(tensor) for tensor in trained(values)]


def without_history(values: Any) -> Any:
    """Values for a chunk on the same worker, as a message would bring them."""
    return rebuilt(values, lambda a: a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a)
