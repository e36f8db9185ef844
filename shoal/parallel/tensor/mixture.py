"""Experts of a mixture, each split as a hidden layer is: ``up`` by its outputs, ``down`` by its inputs.

A mixture weighs whole sequences. Where the others see slices of them, all workers' are joined before it, and the router
does the same everywhere: the gradient that leaves it is whole on every worker, who takes the part of its own slice."""

from typing import Any

from torch import Tensor

from shoal.comm.tensors import Collectives
from shoal.models.moe import ExpertLinear, Experts
from shoal.parallel.layout.passage import Passage
from shoal.parallel.tensor.adopting import adopt
from shoal.parallel.tensor.crossing import Slices, cross, sum_gradients

ENTER, LEAVE = Passage("", "all-reduce"), Passage("all-reduce", "")
JOIN, CUT = Passage("all-gather", "take"), Passage("take", "all-gather")


class _Down(ExpertLinear):
    """Gives every worker its share of the biases: they are added up with the partial sums."""

    def __init__(self, whole: ExpertLinear, collectives: Collectives) -> None:
        adopt(self, whole)
        self.collectives = collectives

    def each(self) -> list[tuple[Tensor, Tensor | None]]:
        (bias,) = sum_gradients(self.collectives, self.bias)
        biases = [None] * len(self.weight) if bias is None else (bias / self.collectives.world).unbind()
        return list(zip(self.weight.unbind(), biases, strict=True))


def split_mixture(experts: Experts, collectives: Collectives) -> None:
    """In place, by hooks: who carries out the experts' forward pass may be somebody else (`shoal.parallel.experts`)."""
    experts.down = _Down(experts.down, collectives)
    experts.register_forward_pre_hook(_enter)
    experts.register_forward_hook(_leave)


def _enter(experts: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return cross(given[0], ENTER, experts.down.collectives, None), *given[1:]


def _leave(experts: Any, given: tuple[Any, ...], answers: Tensor) -> Tensor:
    return cross(answers, LEAVE, experts.down.collectives, None)


class _Edges:
    def __init__(self, collectives: Collectives, slices: Slices) -> None:
        self.collectives, self.slices = collectives, slices

    def enter(self, mixture: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return cross(given[0], JOIN, self.collectives, self.slices.split()), *given[1:]

    def leave(self, mixture: Any, given: tuple[Any, ...], made: Tensor) -> Tensor:
        return cross(made, CUT, self.collectives, self.slices.split())


def enclose(mixture: Any, collectives: Collectives, slices: Slices) -> None:
    """In place: it takes and gives slices [n, own T, width], and works on whole sequences."""
    mixture.edges = _Edges(collectives, slices)
    mixture.register_forward_pre_hook(mixture.edges.enter)
    mixture.register_forward_hook(mixture.edges.leave)
