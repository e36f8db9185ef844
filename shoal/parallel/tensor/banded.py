"""Layers that see a band of an image's rows; each fetches what it lacks at the edges of its band."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.comm.tensors import Collectives
from shoal.models.convolution import Conv2d
from shoal.models.ends import GlobalAverage, Joint
from shoal.models.resnet import PaddedShortcut
from shoal.parallel.layout.passage import Passage
from shoal.parallel.layout.treatment import Banded
from shoal.parallel.layout.window import Window
from shoal.parallel.tensor.adopting import adopt
from shoal.parallel.tensor.crossing import cross, sum_gradients
from shoal.parallel.tensor.halo import fetch_rows


class _Edges:
    """Brings in the rows that a layer's outputs are made of."""

    def __init__(self, treatment: Banded, collectives: Collectives) -> None:
        assert treatment.window is not None
        self.treatment, self.collectives = treatment, collectives
        self.window: Window = treatment.window

    def bring(self, x: Tensor, padding: float) -> Tensor:
        """With ``padding`` above the first and below the last row of the image."""
        rank = self.collectives.rank
        if self.treatment.inputs is None:  # the whole image is here
            low, high = self.window.needed[rank]
            x = x[:, :, low:high]
        else:
            x = fetch_rows(x, self.window, self.collectives)
        above, below = self.window.padded(rank)
        return F.pad(x, (0, 0, above, below), value=padding) if above or below else x


class BandedConv2d(Conv2d):
    def __init__(self, whole: nn.Conv2d, edges: _Edges) -> None:
        adopt(self, whole)
        self.padding = (0, whole.padding[1])  # type: ignore[assignment]
        self.edges = edges

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = sum_gradients(self.edges.collectives, self.weight, self.bias)
        assert weight is not None
        return self.convolve(self.edges.bring(input, 0.0), weight, bias)


class BandedMaxPool2d(nn.MaxPool2d):
    def __init__(self, whole: nn.MaxPool2d, edges: _Edges) -> None:
        adopt(self, whole)
        self.padding = (0, _pair(whole.padding)[1])
        self.edges = edges

    def forward(self, input: Tensor) -> Tensor:
        pooled: Tensor = super().forward(self.edges.bring(input, -torch.inf))
        return pooled


class BandedShortcut(PaddedShortcut):
    def __init__(self, whole: PaddedShortcut, edges: _Edges) -> None:
        adopt(self, whole)
        self.edges = edges

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.edges.bring(x, 0.0))


class BandedBatchNorm2d(nn.BatchNorm2d):
    """Statistics of all bands."""

    def __init__(self, whole: nn.BatchNorm2d, treatment: Banded, collectives: Collectives) -> None:
        adopt(self, whole)
        self.treatment, self.collectives = treatment, collectives

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        assert self.treatment.inputs is not None
        weight, bias = sum_gradients(self.collectives, self.weight, self.bias)
        counts = tuple(rows * len(input) * input.shape[3] for rows in self.treatment.inputs.sizes)
        normed, mean, variance = _Standardise.apply(input, self.eps, counts, self.collectives)  # type: ignore[no-untyped-call]
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._remember(mean, variance, sum(counts))
        scaled: Tensor = normed if weight is None else normed * weight.view(-1, 1, 1)
        return scaled if bias is None else scaled + bias.view(-1, 1, 1)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - share).add_(mean, alpha=share)
        self.running_var.mul_(1 - share).add_(variance, alpha=share * count / max(1, count - 1))


class _Standardise(torch.autograd.Function):
    """Mean 0 and variance 1 in each channel, from each band's mean and squared distances (Chan et al., 1979)."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, eps: float, counts: tuple[int, ...], collectives: Collectives
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, channels, own rows, width] -> (normed, mean [channels], variance [channels])."""
        wide = x if x.dtype == torch.float64 else x.float()
        own = wide.mean((0, 2, 3), keepdim=True)
        facts = torch.stack([own.flatten(), (wide - own).square().sum((0, 2, 3))], -1)
        means, distances = collectives.all_gather(facts.unsqueeze(0)).unbind(-1)  # [workers, channels]
        weights = means.new_tensor(counts).unsqueeze(1)
        total = sum(counts)
        mean = (means * weights).sum(0) / total
        variance = (distances + weights * (means - mean).square()).sum(0) / total
        scale = (variance + eps).rsqrt().view(-1, 1, 1)
        normed = (wide - mean.view(-1, 1, 1)) * scale
        context.save_for_backward(normed, scale)
        context.way = total, collectives, x.dtype
        context.mark_non_differentiable(mean, variance)
        return normed.to(x.dtype), mean, variance

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        normed, scale = context.saved_tensors
        total, collectives, dtype = context.way
        gradient = gradients[0].to(normed.dtype)
        own = torch.stack([gradient.sum((0, 2, 3)), (gradient * normed).sum((0, 2, 3))])
        plain, along = (collectives.all_reduce(own) / total).view(2, -1, 1, 1)
        return (scale * (gradient - plain - normed * along)).to(dtype), None, None, None


class BandedJoint(Joint):
    """From here on every worker has the whole image, and does the same."""

    def __init__(self, whole: Joint, treatment: Banded, collectives: Collectives) -> None:
        adopt(self, whole)
        self.treatment, self.collectives = treatment, collectives

    def forward(self, x: Tensor) -> Tensor:
        return cross(x, Passage("all-gather", "take"), self.collectives, self.treatment.inputs)


class BandedAverage(GlobalAverage):
    def __init__(self, whole: GlobalAverage, treatment: Banded, collectives: Collectives) -> None:
        adopt(self, whole)
        self.treatment, self.collectives = treatment, collectives

    def forward(self, x: Tensor) -> Tensor:
        own = x.sum(dim=(2, 3)) / (self.treatment.height * x.shape[3])
        return cross(own, Passage("all-reduce", ""), self.collectives, None)


def banded(module: nn.Module, treatment: Banded, collectives: Collectives) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        return BandedBatchNorm2d(module, treatment, collectives)
    if isinstance(module, Joint):
        return BandedJoint(module, treatment, collectives)
    if isinstance(module, GlobalAverage):
        return BandedAverage(module, treatment, collectives)
    edges = _Edges(treatment, collectives)
    if isinstance(module, nn.Conv2d):
        return BandedConv2d(module, edges)
    if isinstance(module, nn.MaxPool2d):
        return BandedMaxPool2d(module, edges)
    assert isinstance(module, PaddedShortcut)
    return BandedShortcut(module, edges)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
