"""Which places of a sequence each worker of a context group holds. Pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slices:
    """``ranges[r]`` are rank r's places, in order; together they are 0 .. length - 1, each once."""

    length: int
    ranges: tuple[tuple[range, ...], ...]

    def size(self, rank: int) -> int:
        return sum(map(len, self.ranges[rank]))

    def places(self, rank: int) -> Tensor:
        """int [T of the rank]"""
        return torch.tensor([place for part in self.ranges[rank] for place in part], dtype=torch.long)

    def take(self, t: Tensor, rank: int, dim: int = 1) -> Tensor:
        """Rank's part of a tensor that holds the whole sequence along ``dim``."""
        return torch.cat([t.narrow(dim, part.start, len(part)) for part in self.ranges[rank]], dim)

    def join(self, t: Tensor, dim: int = 1) -> Tensor:
        """All ranks' parts, one after the other along ``dim``, put in the order of the sequence."""
        parts = [part for rank in self.ranges for part in rank]
        cut = dict(zip([part.start for part in parts], torch.split(t, list(map(len, parts)), dim), strict=True))
        return torch.cat([cut[start] for start in sorted(cut)], dim)


def contiguous(length: int, ranks: int) -> Slices:
    """One piece each, the first ones longer by one where it does not divide."""
    return Slices(length, tuple((part,) for part in _pieces(length, ranks)))


def zigzag(length: int, ranks: int) -> Slices:
    """Two pieces each, the r-th from the front and the r-th from the back: under a causal mask a late place looks at
    many and an early one at few, and so all ranks have as much to do (Brandon et al., 2023)."""
    pieces = list(_pieces(length, 2 * ranks))
    return Slices(length, tuple((pieces[r], pieces[-1 - r]) for r in range(ranks)))


def _pieces(length: int, count: int) -> Iterator[range]:
    ends = accumulate((length // count + (each < length % count) for each in range(count)), initial=0)
    return (range(start, stop) for start, stop in pairwise(ends))
