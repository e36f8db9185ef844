"""Dropout that draws fewer random numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, p: float) -> Tensor:
    """As ``torch.nn.functional.dropout`` (Srivastava et al., 2014); on a CPU p is rounded to a multiple of 1/65536.

    There PyTorch draws a whole random number for each element, which takes longer than all else in it; here four
    elements share 64 bits. What is kept is divided by the share kept after the rounding."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(round(p * 65536), 65535)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = torch.empty_like(x, requires_grad=False, memory_format=torch.contiguous_format)
    torch.ge(bits.view(torch.int16)[: x.numel()].view(x.shape), dropped - 32768, out=kept)
    return x * kept.mul_(65536 / (65536 - dropped))


class Dropout(nn.Module):
    """``dropout`` while training, and nothing in evaluation."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"
