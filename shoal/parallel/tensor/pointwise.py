"""Modules that work on each position by itself, on slices of the sequence or of the features."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.comm.tensors import Collectives
from shoal.models.dropout import Part
from shoal.models.ends import Joint, Positions, Segments
from shoal.parallel.layout.passage import Passage
from shoal.parallel.layout.split import Split
from shoal.parallel.layout.treatment import Drawn
from shoal.parallel.tensor.adopting import adopt
from shoal.parallel.tensor.crossing import Slices, cross, sum_gradients


class SlicedNorm(nn.LayerNorm):
    """Sees some positions: the gradients of its weights are added up."""

    def __init__(self, whole: nn.LayerNorm, collectives: Collectives) -> None:
        adopt(self, whole)
        self.collectives = collectives

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = sum_gradients(self.collectives, self.weight, self.bias)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class SplitNorm(nn.LayerNorm):
    """Sees some features of each position: [..., own features]."""

    def __init__(self, whole: nn.LayerNorm, split: Split, collectives: Collectives) -> None:
        adopt(self, whole)
        self.split, self.collectives = split, collectives

    def forward(self, input: Tensor) -> Tensor:
        normed: Tensor = _Standardise.apply(input, self.eps, self.split, self.collectives)  # type: ignore[no-untyped-call]
        if self.weight is not None:
            normed = normed * self.weight
        return normed if self.bias is None else normed + self.bias


class _Standardise(torch.autograd.Function):
    """Mean 0 and variance 1 over all workers' features, from their means and squared distances (Chan et al., 1979)."""

    @staticmethod
    def forward(context: Any, x: Tensor, eps: float, split: Split, collectives: Collectives) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        own = wide.mean(-1, keepdim=True)
        facts = torch.cat([own, (wide - own).square().sum(-1, keepdim=True)], -1)
        means, distances = collectives.all_gather(facts.unsqueeze(0)).unbind(-1)  # [workers, ...]
        counts = means.new_tensor(split.sizes).view(-1, *[1] * (means.dim() - 1))
        mean = (means * counts).sum(0) / split.full
        variance = (distances + counts * (means - mean).square()).sum(0) / split.full
        scale = (variance + eps).rsqrt().unsqueeze(-1)
        normed = (wide - mean.unsqueeze(-1)) * scale
        context.save_for_backward(normed, scale)
        context.way = split.full, collectives, x.dtype
        return normed.to(x.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        normed, scale = context.saved_tensors
        full, collectives, dtype = context.way
        gradient = gradients[0].to(normed.dtype)
        own = torch.cat([gradient.sum(-1, keepdim=True), (gradient * normed).sum(-1, keepdim=True)], -1)
        total, along = (collectives.all_reduce(own) / full).split(1, -1)
        return (scale * (gradient - total - normed * along)).to(dtype), None, None, None


class SlicedPositions(Positions):
    def __init__(self, whole: Positions, collectives: Collectives, slices: Slices) -> None:
        adopt(self, whole)
        self.collectives, self.slices = collectives, slices

    def forward(self, length: int) -> Tensor:  # type: ignore[override]
        (weight,) = sum_gradients(self.collectives, self.weight)
        assert weight is not None
        return self.slices.split(0).take(weight[:length], self.collectives.rank)


class SlicedSegments(Segments):
    def __init__(self, whole: Segments, collectives: Collectives, slices: Slices) -> None:
        adopt(self, whole)
        self.collectives, self.slices = collectives, slices

    def forward(self, types: Tensor | None) -> Tensor:
        (weight,) = sum_gradients(self.collectives, self.weight)
        assert weight is not None
        if types is None:
            return weight[0]
        return F.embedding(self.slices.split().take(types, self.collectives.rank), weight)


class SlicedJoint(Joint):
    """From here on every worker has the whole sequence, and does the same."""

    def __init__(self, whole: Joint, collectives: Collectives, slices: Slices) -> None:
        adopt(self, whole)
        self.collectives, self.slices = collectives, slices

    def forward(self, x: Tensor) -> Tensor:
        return cross(x, Passage("all-gather", "take", "positions"), self.collectives, self.slices.split())


def part_of(treatment: Drawn, collectives: Collectives, slices: Slices) -> Callable[[Tensor], Part]:
    """What tells a dropout which part of the whole it sees."""

    def part(x: Tensor) -> Part:
        split = treatment.split or slices.split()
        return Part(treatment.dim, split.full, split.start(collectives.rank))

    return part
