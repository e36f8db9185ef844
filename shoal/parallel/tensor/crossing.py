"""Collectives that autograd knows: what crosses between workers on the way forward and on the way back."""

from typing import Any

import torch
from torch import Tensor

from shoal.comm.tensors import Collectives
from shoal.parallel.layout.passage import NOTHING, Operation, Passage
from shoal.parallel.layout.rules import TENSOR
from shoal.parallel.layout.split import Split, even_split


def carry_out(operation: Operation, x: Tensor, collectives: Collectives, split: Split | None) -> Tensor:
    """``split`` says which dim of x is cut or joined, and how; None where the operation does neither."""
    if operation == "":
        return x
    if operation == "all-reduce":
        return collectives.all_reduce(x)
    assert split is not None
    if operation == "take":
        return split.take(x, collectives.rank)
    if operation == "all-gather":
        return split.ungrouped(collectives.all_gather(x, split.dim, split.sizes))
    return collectives.reduce_scatter(split.grouped(x), split.dim, split.sizes)


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, passage: Passage, collectives: Collectives, split: Split | None) -> Tensor:
        context.way = passage.backward, collectives, split
        out = carry_out(passage.forward, x, collectives, split)
        return out.view_as(out)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        operation, collectives, split = context.way
        return carry_out(operation, gradients[0], collectives, split), None, None, None


def cross(x: Tensor, passage: Passage, collectives: Collectives, split: Split | None) -> Tensor:
    """x as ``passage`` takes it forward, its gradient as it takes that back."""
    if passage == NOTHING:
        return x
    out: Tensor = _Crossing.apply(x, passage, collectives, split)  # type: ignore[no-untyped-call]
    return out


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, collectives: Collectives, *tensors: Tensor) -> tuple[Tensor, ...]:
        context.collectives = collectives
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        pieces = context.collectives.all_reduce(flat).split([gradient.numel() for gradient in gradients])
        return None, *(piece.view(g.shape) for piece, g in zip(pieces, gradients, strict=True))


def sum_gradients(collectives: Collectives, *parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters themselves; their gradients are added up over the workers, in one message.

    For weights that all workers hold while each sees other positions or rows."""
    trained = [p for p in parameters if p is not None and p.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return list(parameters)
    summed = iter(_SumGradients.apply(collectives, *trained))  # type: ignore[no-untyped-call]
    return [next(summed) if p is not None and p.requires_grad else p for p in parameters]


class Slices:
    """The sequence that a model works on, where each worker has a slice of it: [n, T, width] is cut in dim 1."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._length = 0
        self._entered = False

    def enter(self, length: int) -> None:
        """At the model's beginning: so long is the whole sequence."""
        self._length, self._entered = length, True

    def learn(self, x: Tensor) -> None:
        """Where no sequence has entered, in a later stage of a pipeline: how long the whole is that x is a slice of."""
        if self._entered:
            self._entered = False
            return
        self._length = int(self._collectives.all_gather(torch.tensor([x.shape[1]], device=x.device)).sum())

    def split(self, dim: int = 1) -> Split:
        return even_split(dim, TENSOR, self._length, self._collectives.world)

    @property
    def start(self) -> int:
        return self.split().start(self._collectives.rank)
