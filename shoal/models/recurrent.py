"""PyTorch's LSTM layers, on processors without bfloat16 instructions, too."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function


class LSTMLayers(nn.LSTM):
    """As `torch.nn.LSTM`. Under bfloat16 autocast it computes in float32 on a processor without AVX-512: oneDNN has no
    LSTM in bfloat16 there, and torch raises "could not create a primitive descriptor"."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As there: (input [n, T, features], (h, c) or None) -> (states [n, T, hidden], (h, c))."""
        if _can(input):
            return super().forward(input, hx)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float(), hx)


@wrap_torch_function(lambda input, *_: (input,))  # one call to whoever records a model's calls
def lstm(input: Tensor, hx: tuple[Tensor, Tensor], *others: Any) -> Any:
    """As `torch.lstm`, in the precision in which `LSTMLayers` computes."""
    if _can(input):
        return torch.lstm(input, hx, *others)
    with torch.autocast("cpu", enabled=False):
        return torch.lstm(input.float(), tuple(states.float() for states in hx), *others)


def _can(input: Tensor) -> bool:
    return input.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or _has_bfloat16()


@cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
