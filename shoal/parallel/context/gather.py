"""Whole sequences from the workers' slices, with gradients."""

from typing import Any

import torch
from torch import Tensor

from shoal.parallel.context.ring import Ring


def gather_sequence(t: Tensor, ring: Ring) -> Tensor:
    """[n, T of this rank, ...] -> [n, T, ...] on all ranks; a gradient is the sum of what all ranks have for it."""
    whole: Tensor = _Gather.apply(t, ring)  # type: ignore[no-untyped-call]
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, t: Tensor, ring: Ring) -> Tensor:
        context.ring, context.slices = ring, ring.slices
        sizes = [ring.slices.size(rank) for rank in range(ring.collectives.world)]
        return ring.slices.join(ring.collectives.all_gather(t, 1, sizes))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        slices, collectives = context.slices, context.ring.collectives
        ranks = range(collectives.world)
        by_rank = torch.cat([slices.take(gradients[0], rank) for rank in ranks], 1)
        return collectives.reduce_scatter(by_rank, 1, [slices.size(rank) for rank in ranks]), None
