"""fp16 and bf16: each number rounded to 16 bits."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shoal.comm.compression import fused
from shoal.comm.compression.codec import Codec, wanted


@dataclass(frozen=True)
class _Cast(Codec):
    """Rounded to nearest, ties to even; too large a finite number becomes the largest one."""

    dtype: ClassVar[torch.dtype]

    def body_bytes(self, elements: int) -> int:
        return 2 * elements

    def _compress_fused(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None:
        fused.call(f"shoal_{self.name}_compress", gradient, error, body, gradient.numel())

    def _open_fused(self, body: Tensor, into: Tensor, *, add: bool) -> None:
        fused.call(f"shoal_{self.name}_{'add' if add else 'restore'}", body, into, into.numel())

    def _compress_plain(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None:
        values = wanted(gradient, error)
        half = values.to(self.dtype)
        largest = torch.full_like(half, torch.finfo(self.dtype).max)
        half = torch.where(half.isinf() & values.isfinite(), largest.copysign(half), half)
        half = torch.where(values.isnan(), _nan(values, self.dtype), half)
        body[: 2 * half.numel()].copy_(half.view(torch.uint8))
        if error is not None:
            rest = values - half.float()
            error.copy_(torch.where(rest.isfinite(), rest, torch.zeros_like(rest)))

    def _opened_plain(self, body: Tensor, elements: int) -> Tensor:
        return body[: 2 * elements].view(self.dtype).float()


def _nan(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The quiet NaN with no other bits, with the sign of each of ``values``."""
    quiet = 0x7FC0 if dtype == torch.bfloat16 else 0x7E00
    sign = (values.contiguous().view(torch.int32) >> 31).to(torch.int16) & -0x8000
    return (sign | quiet).view(dtype)


@dataclass(frozen=True)
class Bfloat16(_Cast):
    name = "bf16"
    kind = 1
    dtype = torch.bfloat16


@dataclass(frozen=True)
class Float16(_Cast):
    name = "fp16"
    kind = 2
    dtype = torch.float16
