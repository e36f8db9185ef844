"""Convolution of images with the channels innermost."""

import torch
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """As ``nn.Conv2d``. On a CPU it computes with the channels laid out last: a small network takes half the time.

    The parameter itself keeps its usual layout, which optimisers, buckets and files rely on."""

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.weight, self.bias)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As ``forward`` with another weight and bias."""
        if input.device.type == "cpu":
            # a clone, since a weight with one input channel counts as laid out in both ways and would be left as it is
            weight = weight.clone(memory_format=torch.channels_last)
        output: Tensor = self._conv_forward(input, weight, bias)
        return output
