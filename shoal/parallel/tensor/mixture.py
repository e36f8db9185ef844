"""Experts of a mixture, each split as a hidden layer is: ``up`` by its outputs, ``down`` by its inputs."""

from typing import Any

from torch import Tensor

from shoal.comm.tensors import Collectives
from shoal.models.moe import ExpertLinear, Experts
from shoal.parallel.layout.passage import Passage
from shoal.parallel.tensor.adopting import adopt
from shoal.parallel.tensor.crossing import cross, sum_gradients

ENTER, LEAVE = Passage("", "all-reduce"), Passage("all-reduce", "")


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
