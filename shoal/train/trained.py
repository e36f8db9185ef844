"""What is summed over one group of workers: parameters with a gradient, and buffers, as they lie in a flat buffer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shoal.comm.layout import Layout


@dataclass(frozen=True)
class Trained:
    """Tensors whose gradients and changes are summed over the same workers: all of a model's, or a part's."""

    parameters: Mapping[str, nn.Parameter]  # that require a gradient, in the order of readiness
    buffers: Mapping[str, torch.Tensor]
    layout: Layout  # of the parameters, then the buffers, in a flat buffer
    dtype: torch.dtype  # of the sums

    @staticmethod
    def real(buffer: torch.Tensor) -> torch.Tensor:
        """A buffer as the layout counts its elements."""
        return torch.view_as_real(buffer) if buffer.is_complex() else buffer
