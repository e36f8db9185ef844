"""Top-k: the numbers of largest magnitude with their positions, those that reach a threshold estimated from a sample.

The rule, the same for the kernel and its twin. Up to 4096 elements all are the sample; of more, 4096 to 16384, one at a
hashed place within each of as many equal strides. With ``above`` of the sample's largest left in, its smallest is the
threshold; ``above`` is a standard deviation below what the share asks for, so that there is mostly room for all that
reach it. They are taken in order of position until the room is full; the others stay in the error. Zeros are not sent.
A number that is not finite and finds no room makes the last value NaN, so that it is not silently dropped.

Body: the number of entries (uint64), then room for positions (uint32, ascending) and values (float32), else zero.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shoal.comm.compression import fused
from shoal.comm.compression.codec import INFINITY_BITS, BadPayload, Codec, magnitude_bits, wanted
from shoal.errors import UserError

SMALLEST_SAMPLE, LARGEST_SAMPLE = 4096, 16384
ELEMENTS_A_SAMPLE = 64
GOLDEN = 2654435769  # 2^32 / the golden ratio


@dataclass(frozen=True)
class Sample:
    """Which elements the threshold is estimated from, and how many of them are to reach it."""

    size: int
    stride: int
    above: int


def sample_of(elements: int, room: int) -> Sample:
    if elements <= SMALLEST_SAMPLE:
        return Sample(elements, 1, room)
    size = min(max(SMALLEST_SAMPLE, elements // ELEMENTS_A_SAMPLE), LARGEST_SAMPLE)
    expected = room * size // elements
    return Sample(size, elements // size, max(1, expected - math.isqrt(expected)))


@dataclass(frozen=True)
class TopShare(Codec):
    """``share``: of the elements of a payload, 0 < share <= 1; at least one element."""

    share: float = 0.01
    name: ClassVar[str] = "topk"
    kind: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise UserError(
                f"top-k: share {self.share} must be above 0 and at most 1, such as 0.01 for one in a hundred."
            )

    def room(self, elements: int) -> int:
        return min(elements, max(1, math.ceil(elements * self.share)))

    def body_bytes(self, elements: int) -> int:
        return 8 + 8 * self.room(elements)

    def _compress_fused(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None:
        elements = gradient.numel()
        room = self.room(elements)
        sample = sample_of(elements, room)
        sizes = (elements, room, sample.size, sample.stride, sample.above)
        if fused.call("shoal_topk_compress", gradient, error, body, *sizes):
            raise UserError(f"top-k: no sample of {sizes} can be taken.")

    def _open_fused(self, body: Tensor, into: Tensor, *, add: bool) -> None:
        if not add:
            into.zero_()
        if fused.call("shoal_topk_add", body, into, into.numel(), self.room(into.numel())):
            raise BadPayload(self._bad(into.numel()))

    def _bad(self, elements: int) -> str:
        return (
            f"top-k of {elements} elements: entries are more than {self.room(elements)}, not ascending or out of range"
        )

    def _compress_plain(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None:
        values = wanted(gradient, error)
        room = self.room(values.numel())
        magnitudes = magnitude_bits(values)
        reaching = magnitudes >= _threshold(magnitudes, sample_of(values.numel(), room))
        positions = reaching.nonzero().view(-1)[:room]
        entries = torch.zeros(room, dtype=torch.float32, device=body.device)
        indices = torch.zeros(room, dtype=torch.int64, device=body.device)
        chosen = values[positions]
        entries[: len(positions)] = torch.where(chosen.isnan(), torch.nan, chosen)  # one NaN, with no bits of its own
        indices[: len(positions)] = positions
        unsent = torch.ones_like(reaching)
        unsent[positions] = False
        lost = unsent & (magnitudes >= INFINITY_BITS)
        if len(positions) == room and bool(lost.any()):
            entries[-1] = torch.nan
        body[:8].copy_(torch.tensor([len(positions)], device=body.device).view(torch.uint8))
        signed = torch.where(indices >= 1 << 31, indices - (1 << 32), indices).to(torch.int32)
        body[8 : 8 + 4 * room].copy_(signed.view(torch.uint8))
        body[8 + 4 * room : 8 + 8 * room].copy_(entries.view(torch.uint8))
        if error is not None:
            error.copy_(torch.where(unsent & ~lost, values, 0.0))

    def _entries(self, body: Tensor, elements: int) -> tuple[Tensor, Tensor]:
        """(positions, values) that a body holds. Raises BadPayload."""
        room = self.room(elements)
        count = int(body[:8].view(torch.int64).item())
        if not 0 <= count <= room:
            raise BadPayload(self._bad(elements))
        positions = body[8 : 8 + 4 * count].view(torch.int32).long() & 0xFFFFFFFF
        if bool((positions >= elements).any()) or bool((positions.diff() <= 0).any()):
            raise BadPayload(self._bad(elements))
        return positions, body[8 + 4 * room : 8 + 4 * room + 4 * count].view(torch.float32)

    def _opened_plain(self, body: Tensor, elements: int) -> Tensor:
        positions, values = self._entries(body, elements)
        opened = torch.zeros(elements, dtype=torch.float32, device=body.device)
        opened[positions] = values
        return opened

    def _add_plain(self, body: Tensor, into: Tensor) -> None:
        positions, values = self._entries(body, into.numel())
        into[positions] += values  # elsewhere nothing is added: not even the zero that makes 0.0 of -0.0


def _threshold(magnitudes: Tensor, sample: Sample) -> int:
    places = torch.arange(sample.size, device=magnitudes.device)
    within = ((places * GOLDEN & 0xFFFFFFFF) * sample.stride) >> 32
    taken = magnitudes[places * sample.stride + within]
    return max(1, int(taken.topk(sample.above).values[-1].item()))
