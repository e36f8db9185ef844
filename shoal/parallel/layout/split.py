"""How a tensor is cut along one dim, and put together again."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

Run = tuple[int, int]  # from, to


@dataclass(frozen=True)
class Split:
    """Which places of ``dim`` each coordinate along ``axis`` keeps: runs, in order. Together they are all places."""

    dim: int
    axis: str
    kept: tuple[tuple[Run, ...], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Of each coordinate's part."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.kept)

    @cached_property
    def full(self) -> int:
        return sum(self.sizes)

    @property
    def contiguous(self) -> bool:
        """Every coordinate keeps one run, so that the parts in their order are the whole."""
        return all(len(runs) == 1 for runs in self.kept)

    def along(self, dim: int) -> "Split":
        """The same places of another dim: of activations, for example."""
        return self if dim == self.dim else _along(self, dim)

    def start(self, coordinate: int) -> int:
        """Where a contiguous part begins."""
        return self.kept[coordinate][0][0]

    def take(self, full: Tensor, coordinate: int) -> Tensor:
        """The part of ``full`` that a coordinate keeps; a view where it is one run."""
        parts = [full.narrow(self.dim, start, stop - start) for start, stop in self.kept[coordinate]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def join(self, locals: Sequence[Tensor]) -> Tensor:
        """The inverse of ``take``, from the parts of all coordinates in order."""
        if self.contiguous:
            return torch.cat(list(locals), self.dim)
        pieces = [
            (start, piece)
            for part, runs in zip(locals, self.kept, strict=True)
            for (start, _), piece in zip(runs, torch.split(part, [b - a for a, b in runs], self.dim), strict=True)
        ]
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], self.dim)

    def grouped(self, full: Tensor) -> Tensor:
        """``full`` in the order of the coordinates: each one's part as one run."""
        return full if self.contiguous else torch.cat([self.take(full, c) for c in range(len(self.kept))], self.dim)

    def ungrouped(self, grouped: Tensor) -> Tensor:
        """The inverse of ``grouped``."""
        return grouped if self.contiguous else self.join(torch.split(grouped, list(self.sizes), self.dim))


@cache
def _along(split: Split, dim: int) -> Split:
    return Split(dim, split.axis, split.kept)


def shares(units: int, ways: int) -> list[int]:
    """As even as whole units allow, the first ones one more: 7 on 2 -> [4, 3]."""
    return [units // ways + (each < units % ways) for each in range(ways)]


@cache
def even_split(dim: int, axis: str, size: int, ways: int, parts: int = 1, unit: int = 1) -> Split:
    """Every coordinate keeps whole units of each of the ``parts``, as evenly as that goes."""
    each = size // parts
    counts = shares(each // unit, ways)
    starts = [unit * sum(counts[:c]) for c in range(ways)]
    return Split(
        dim,
        axis,
        tuple(
            tuple((part * each + start, part * each + start + unit * count) for part in range(parts))
            for start, count in zip(starts, counts, strict=True)
        ),
    )
