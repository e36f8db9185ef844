"""Dropout that draws fewer random numbers, and the same ones for a part of a tensor as for the whole."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """A tensor is the places from ``start`` on of a larger one that is ``size`` long in ``dim``."""

    dim: int
    size: int
    start: int

    def whole(self, x: Tensor) -> list[int]:
        """The shape of what x is a part of."""
        shape = list(x.shape)
        shape[self.dim] = self.size
        return shape

    def of(self, whole: Tensor, x: Tensor) -> Tensor:
        return whole.narrow(self.dim, self.start, x.shape[self.dim])


def dropout(x: Tensor, p: float, part: Part | None = None) -> Tensor:
    """As ``torch.nn.functional.dropout`` (Srivastava et al., 2014); on a CPU p is rounded to a multiple of 1/65536.

    There PyTorch draws a whole random number for each element, which takes longer than all else in it; here four
    elements share 64 bits. What is kept is divided by the share kept after the rounding.
    With ``part`` the numbers are drawn for the whole of which x is a part, so that they do not depend on the cut."""
    if p == 0:
        return x
    shape = list(x.shape) if part is None else part.whole(x)
    if x.device.type != "cpu":
        return F.dropout(x, p) if part is None else x * part.of(F.dropout(x.new_ones(shape), p), x)
    dropped = min(round(p * 65536), 65535)
    count = torch.Size(shape).numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[:count].view(shape)
    drawn = drawn if part is None else part.of(drawn, x)
    kept = torch.empty_like(x, requires_grad=False, memory_format=torch.contiguous_format)
    torch.ge(drawn, dropped - 32768, out=kept)
    return x * kept.mul_(65536 / (65536 - dropped))


class Dropout(nn.Module):
    """``dropout`` while training, and nothing in evaluation.

    ``dims`` names the dims of what comes in. A layout that splits one of them sets ``part``, which tells of each input
    what part of the whole it is."""

    def __init__(self, p: float, dims: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.p = p
        self.dims = dims
        self.part: Callable[[Tensor], Part] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return dropout(x, self.p, self.part(x) if self.part else None)

    def extra_repr(self) -> str:
        return f"p={self.p}"
