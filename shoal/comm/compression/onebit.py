"""1 bit: blocks of 2048 as signs and the mean magnitude (Seide et al., 2014: it rests on error feedback).

Body: block after block, 64 words of 32 signs and the mean. Bit r of word l is the sign of the block's element 64 r + l:
vectors of words are then filled by shifts alone. The last block is padded with zeros, which do not count in its mean.
A block whose sum of magnitudes is not finite arrives as NaN.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shoal.comm.compression import fused
from shoal.comm.compression.codec import Codec, in_blocks, wanted

LANES, ROWS = 64, 32
BLOCK = LANES * ROWS
BYTES = 4 * (LANES + 1)  # of a block


@dataclass(frozen=True)
class SignBits(Codec):
    name: ClassVar[str] = "1bit"
    kind: ClassVar[int] = 4

    def body_bytes(self, elements: int) -> int:
        return BYTES * -(-elements // BLOCK)

    def _compress_fused(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None:
        fused.call("shoal_onebit_compress", gradient, error, body, gradient.numel())

    def _open_fused(self, body: Tensor, into: Tensor, *, add: bool) -> None:
        fused.call(f"shoal_onebit_{'add' if add else 'restore'}", body, into, into.numel())

    def _compress_plain(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None:
        elements = gradient.numel()
        values = in_blocks(wanted(gradient, error), BLOCK)
        counts = torch.full((len(values),), float(BLOCK), device=values.device)
        counts[-1] = elements - (len(values) - 1) * BLOCK
        means = _lane_sum(values.abs().view(-1, ROWS, LANES)) / counts
        finite = means.isfinite().unsqueeze(1)
        negative = torch.signbit(values)
        shifts = torch.arange(ROWS, device=values.device).view(1, ROWS, 1)
        words = (negative.view(-1, ROWS, LANES).long() << shifts).sum(dim=1)
        means = torch.where(finite, means.unsqueeze(1), torch.nan)
        signs = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
        out = torch.cat([signs, means.view(torch.int32)], dim=1)
        body[: 4 * out.numel()].copy_(out.view(-1).view(torch.uint8))
        if error is not None:
            rest = values - torch.where(negative, -means, means)
            error.copy_(torch.where(finite, rest, 0.0).view(-1)[:elements])

    def _opened_plain(self, body: Tensor, elements: int) -> Tensor:
        blocks = -(-elements // BLOCK)
        table = body[: BYTES * blocks].view(torch.int32).view(blocks, LANES + 1)
        shifts = torch.arange(ROWS, device=body.device, dtype=torch.int32).view(1, ROWS, 1)
        negative = ((table[:, :LANES].unsqueeze(1) >> shifts) & 1).bool().view(blocks, BLOCK)
        means = table[:, LANES:].contiguous().view(torch.float32)
        return torch.where(negative, -means, means).view(-1)[:elements]


def _lane_sum(values: Tensor) -> Tensor:
    """[blocks, rows, lanes] -> [blocks], in the kernel's order: the rows one after the other, then lanes in halves."""
    sums = torch.zeros_like(values[:, 0])
    for row in range(values.shape[1]):
        sums = sums + values[:, row]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]
