"""int8: blocks of 2048 as whole numbers from -127 to 127 and one float32 scale, the largest magnitude over 127.

Body: the scales of all blocks, then the whole numbers. A block whose scale is below the smallest normal float32 is sent
as zero; one that is not finite arrives as NaN.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shoal.comm.compression import fused
from shoal.comm.compression.codec import INFINITY_BITS, Codec, in_blocks, magnitude_bits, wanted

BLOCK = 2048  # elements that share a scale
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int8Blocks(Codec):
    name: ClassVar[str] = "int8"
    kind: ClassVar[int] = 3

    def body_bytes(self, elements: int) -> int:
        return 4 * -(-elements // BLOCK) + elements

    def _compress_fused(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None:
        fused.call("shoal_int8_compress", gradient, error, body, gradient.numel())

    def _open_fused(self, body: Tensor, into: Tensor, *, add: bool) -> None:
        fused.call(f"shoal_int8_{'add' if add else 'restore'}", body, into, into.numel())

    def _compress_plain(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None:
        elements = gradient.numel()
        values = in_blocks(wanted(gradient, error), BLOCK)
        largest = magnitude_bits(values).amax(dim=1, keepdim=True)
        finite = largest < INFINITY_BITS
        values = torch.where(finite, values, 0.0)
        # divided by a tensor: by a plain number, some devices multiply with its reciprocal instead
        peaks = torch.where(finite, largest, 0).view(torch.float32)
        scales = peaks / torch.full_like(peaks, 127.0)
        worth = scales >= SMALLEST_NORMAL  # the reciprocal of a smaller one could overflow
        inverses = torch.where(worth, torch.ones_like(scales) / torch.where(worth, scales, 1.0), 0.0)
        scales = torch.where(worth, scales, 0.0)
        numbers = torch.round(values * inverses).to(torch.int8)
        body[: 4 * len(scales)].copy_(torch.where(finite, scales, torch.nan).view(-1).view(torch.uint8))
        body[4 * len(scales) : 4 * len(scales) + elements].copy_(numbers.view(-1)[:elements].view(torch.uint8))
        if error is not None:
            error.copy_((values - numbers.float() * scales).view(-1)[:elements])

    def _opened_plain(self, body: Tensor, elements: int) -> Tensor:
        blocks = -(-elements // BLOCK)
        scales = body[: 4 * blocks].view(torch.float32)
        numbers = body[4 * blocks : 4 * blocks + elements].view(torch.int8)
        return (in_blocks(numbers.float(), BLOCK) * scales.unsqueeze(1)).view(-1)[:elements]
