"""The layers at the two ends of a model that a layout may replace by ones for a part of the tensors."""

import torch.nn.functional as F
from torch import Tensor, nn


class Positions(nn.Embedding):
    """The vectors of the first ``length`` places: [length, width].

    A slice of the weight, not a lookup: its gradient is a sum over samples instead of a scatter."""

    def forward(self, length: int) -> Tensor:  # type: ignore[override]
        return self.weight[:length]


class Segments(nn.Embedding):
    """The vectors of kinds of segment int [n, T]: [n, T, width]; None: that of kind 0 for all, [width]."""

    def forward(self, types: Tensor | None) -> Tensor:
        return self.weight[0] if types is None else super().forward(types)


class Logits(nn.Module):
    """States [..., width] and the weight [vocab, width] of another layer -> logits [..., vocab]."""

    def __init__(self, dims: tuple[str, str] = ("vocab", "width")) -> None:
        super().__init__()
        self.dims = dims  # those of the weight

    def forward(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(states, weight, bias)


class Joint(nn.Module):
    """Nothing; where what may be cut along the sequence or into bands of rows is put together again.

    ``dims`` names the dims of what comes in."""

    def __init__(self, dims: tuple[str, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x


class GlobalAverage(nn.Module):
    """The mean of each channel: [n, channels, height, width] -> [n, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))
