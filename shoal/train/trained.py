"""What is summed over one group of workers: parameters with a gradient, and buffers, as they lie in a flat buffer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shoal.comm.layout import Layout


def storage_users(tensor: torch.Tensor) -> int:
    """How many hold the tensor's memory, this call among them."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


UNSHARED = storage_users(torch.empty(1))


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
