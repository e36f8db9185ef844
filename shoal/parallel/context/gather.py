"""Whole sequences from the workers' slices, with gradients."""

from typing import Any

import torch
from torch import Tensor

from shoal.parallel.context.ring import Ring
from shoal.parallel.context.slices import SEQUENCE


def gather_sequence(t: Tensor, ring: Ring) -> Tensor:
    """[n, T of this rank, ...] -> [n, T, ...] on all ranks; a gradient is the sum of what all ranks have for it."""
    whole: Tensor = _Gather.apply(t, ring)  # type: ignore[no-untyped-call]
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, t: Tensor, ring: Ring) -> Tensor:
        context.ring, context.slices = ring, ring.slices
        return ring.slices.ungrouped(ring.collectives.all_gather(t, SEQUENCE, ring.slices.sizes))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        slices, collectives = context.slices, context.ring.collectives
        return collectives.reduce_scatter(slices.grouped(gradients[0]), SEQUENCE, slices.sizes), None
