"""PyTorch's LSTM layers, on processors without bfloat16 instructions, too."""

from functools import cache
from typing import Any

import torch
from torch import nn


class LSTMLayers(nn.LSTM):
    """As `torch.nn.LSTM`. Under bfloat16 autocast it computes in float32 on a processor without AVX-512: oneDNN has no
    LSTM in bfloat16 there, and torch raises "could not create a primitive descriptor"."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As there: (input [n, T, features], (h, c) or None) -> (states [n, T, hidden], (h, c))."""
        if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or _has_bfloat16():
            return super().forward(input, hx)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float(), hx)


@cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
