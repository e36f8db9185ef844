"""Tokens on their way to the workers that hold their experts, and back (Lepikhin et al., 2020, section 3.2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.comm.tensors import Collectives
from shoal.models.moe import Experts
from shoal.parallel.layout.split import Split


class ExpertsElsewhere:
    """What stands in for `Experts.forward` on a worker that holds some of the experts only.

    Called by all workers of the group at the same layer, with any number of tokens each. The rows of each worker go
    through an expert by themselves, in the order in which that worker has them: so the results have the bits of one
    process that holds all experts, and a gradient is the sum over the workers in the order of their ranks."""

    def __init__(self, module: Experts, split: Split, collectives: Collectives) -> None:
        self.module, self.split, self.collectives = module, split, collectives

    def __call__(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Own rows [m, width] by expert, all experts counted -> [m, width]."""
        by_owner = [counts[start:stop] for ((start, stop),) in self.split.kept]
        leave = [sum(part) for part in by_owner]
        told = self.collectives.all_to_all([torch.tensor(part) for part in by_owner])
        come = [part.tolist() for part in told]  # [from][own expert]
        arrived = _travel(rows, leave, self.collectives)
        answers = self._answer(arrived, come)
        return _travel(answers, [sum(part) for part in come], self.collectives)

    def _answer(self, rows: Tensor, counts: list[list[int]]) -> Tensor:
        ups, downs = self.module.up.each(), self.module.down.each()
        pieces = iter(torch.split(rows, [count for part in counts for count in part]))
        made = []
        for _ in counts:
            for up, down in zip(ups, downs, strict=True):
                x = next(pieces)
                if len(x) or not len(rows):  # without a token, gradients are zeros here as in the whole model: not none
                    made.append(F.linear(self.module.activation(F.linear(x, *up)), *down))
        return torch.cat(made)


def _travel(rows: Tensor, counts: list[int], collectives: Collectives) -> Tensor:
    """The first ``counts[0]`` rows go to rank 0, and so on; what comes from rank 0, 1, ... Gradients go back."""
    # one worker may have nothing that needs a gradient where others have: all go back together, or none
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
    arrived: Tensor = _Travel.apply(rows, anchor, counts, collectives)  # type: ignore[no-untyped-call]
    return arrived


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, anchor: Tensor, counts: list[int], collectives: Collectives) -> Tensor:
        parts = collectives.all_to_all(torch.split(rows, counts))
        context.collectives, context.counts = collectives, [len(part) for part in parts]
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = context.collectives.all_to_all(torch.split(gradients[0], context.counts))
        return torch.cat(parts), None, None, None
