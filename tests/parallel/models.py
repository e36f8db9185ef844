"""Models that are awkward to cut, each with a batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """Skip connections from each level down to the same level up (Ronneberger et al., 2015): [n, 2, 16, 16]."""

    def __init__(self, widths: tuple[int, ...] = (4, 6, 8)) -> None:
        super().__init__()
        channels = (2, *widths)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(channels, widths, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        back = tuple(reversed(widths))
        self.up = nn.ModuleList(nn.Conv2d(2 * a, b, 3, padding=1) for a, b in zip(back, (*back[1:], 2), strict=True))

    def forward(self, image: Tensor) -> Tensor:
        x, skipped = image, []
        for convolution, norm in zip(self.down, self.norms, strict=True):
            skipped.append(F.relu(norm(convolution(x))))
            x = F.max_pool2d(skipped[-1], 2)
        for convolution in self.up:
            skip = skipped.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest") if x.shape[-1] != skip.shape[-1] else x
            x = convolution(torch.cat([x, skip], 1))
        return x


class InPlace(nn.Module):
    """Layers and code that write into what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        stream += x
        self.seen.add_(len(x))
        step = self.relu(self.second(stream * 2))
        other = stream
        stream += step
        last = self.third(stream)
        last[:, 0] = 0.0
        return last + other * self.seen


class Branching(nn.Module):
    """Code that asks for sizes, types, the mode, None; loops; values of several kinds between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, rate: float = 0.25) -> dict[str, Any]:
        if isinstance(x, Tensor) and x.dim() != 2:
            raise ValueError("not [n, 5]")
        count, kept = len(x), []
        pair = (x, None)
        for number, layer in enumerate(self.layers):
            width = pair[0].shape[-1]
            y = F.dropout(layer(pair[0]), rate, self.training) * self.scale / math.sqrt(number + 1)
            if pair[1] is not None:
                y = y + pair[1]
            kept.append(y.sum(-1))
            pair = (y.tanh(), y if number % 2 else None)
        positions = torch.arange(count, device=x.device)[:, None] * width
        if mask is not None:
            positions = positions * mask[:, None]
        return {"states": (pair[0] + positions, kept), "width": width, "none": None}


class Ranges(nn.Module):
    """A number that the code works out early and needs late, and draws that take no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.table = torch.linspace(0.0, 1.0, 9)  # neither a parameter nor a buffer

    def forward(self, tokens: Tensor) -> tuple[Tensor, int]:
        x = self.embed(tokens)
        rows, length, width = x.shape
        noise = torch.randn(rows, 1, width)
        x = self.mix(x + noise) + self.table[:length, None]
        keep = x.max(dim=1)
        return self.head(x.reshape(rows * length, width)).view(rows, length, -1) + keep.values[..., :1, None], length


class Shared(nn.Module):
    """One layer used at both ends, and a weight tied to another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.GELU())
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.middle(self.block(self.tokens(tokens)))))


class Doubled(torch.autograd.Function):
    """Its gradient is not that of its forward pass, so that a recording which looks inside would show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Doubled.apply(self.first(x)))


class Frozen(nn.Module):
    """The first layers need no gradient, in evaluation mode for good."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 5)).eval()
        self.body.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Recurrent(nn.Module):
    """Stacked recurrent layers with dropout between them, in both directions, and with given first states."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 3) -> None:
        super().__init__()
        self.stack = kind(4, 5, layers, dropout=0.3, bidirectional=True, batch_first=True)
        self.second = kind(10, 5, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.stack(x)
        hidden = last[0] if isinstance(last, tuple) else last
        first = hidden[:2, : x.shape[1]].repeat(1, x.shape[1], 1)[:, : x.shape[1]].contiguous()
        begin = (first, first) if isinstance(last, tuple) else first
        return self.head(self.second(states, begin)[0])


class TwoLoops(nn.Module):
    """A recurrent cell unrolled by hand: the number of steps is part of the recording."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 4)
        for step in range(x.shape[1]):
            h, c = self.cell(x[:, step], (h, c))
        return self.head(h)


def _floats(*shape: int) -> Tensor:
    return torch.randn(6, *shape, generator=torch.Generator().manual_seed(1))


def _tokens(*shape: int) -> Tensor:
    return torch.randint(7, (6, *shape), generator=torch.Generator().manual_seed(2))


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(8, 2))


@dataclass(frozen=True)
class Awkward:
    make: Callable[[], nn.Module]
    batch: dict[str, Any]  # arguments of a forward pass of 6 samples

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def first(self, samples: int) -> dict[str, Any]:
        return {name: a[:samples] if isinstance(a, Tensor) else a for name, a in self.batch.items()}


AWKWARD: dict[str, Awkward] = {
    "unet": Awkward(UNet, {"image": _floats(2, 16, 16)}),
    "in-place": Awkward(InPlace, {"x": _floats(6)}),
    "branching": Awkward(Branching, {"x": _floats(5), "mask": torch.tensor([1.0, 0, 1, 1, 0, 1])}),
    "branching-without-mask": Awkward(Branching, {"x": _floats(5)}),
    "ranges": Awkward(Ranges, {"tokens": _tokens(5)}),
    "shared": Awkward(Shared, {"tokens": _tokens(5)}),
    "custom-function": Awkward(Custom, {"x": _floats(4)}),
    "frozen": Awkward(Frozen, {"x": _floats(4)}),
    "lstm-stack": Awkward(Recurrent, {"x": _floats(5, 4)}),
    "gru-stack": Awkward(lambda: Recurrent(nn.GRU), {"x": _floats(5, 4)}),
    "rnn-stack": Awkward(lambda: Recurrent(nn.RNN), {"x": _floats(5, 4)}),
    "two-loops": Awkward(TwoLoops, {"x": _floats(5, 3)}),
    "transformer": Awkward(_transformer, {"input": _floats(4, 5)}),
}
