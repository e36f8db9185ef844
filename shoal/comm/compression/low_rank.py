"""PowerSGD (Vogels et al., 2019): a matrix M [a, b] is sent as P [a, r] and Q [b, r], one step of power iteration.

P = sum of M Q over the ranks, made orthonormal; then Q = mean of M^T P; the mean of M is taken to be P Q^T. Both are
linear, so nothing is unpacked on the way. Q is the next step's start. What P Q_own^T leaves of the own M is fed back.
What is no matrix, or too small a one, is sent as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from shoal.comm.compression.links import Links
from shoal.comm.compression.reduction import Divisor, RawReduction, Steps, raw_bytes
from shoal.errors import UserError

GAIN = 2  # a matrix is factored where its factors are at least so many times smaller
NOTHING_LEFT = 1e-6  # a column that lies in the span of those before it, but for rounding


@dataclass(frozen=True)
class Cut:
    """A part of a flat vector: a matrix [rows, columns], or as it is (columns = 0)."""

    start: int
    rows: int
    columns: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.rows * max(1, self.columns)

    def of(self, flat: Tensor) -> Tensor:
        """This part of the vector: a view [rows, columns] or [rows]."""
        part = flat[self.start : self.stop]
        return part.view(self.rows, self.columns) if self.columns else part


def cuts_of(shapes: Sequence[Sequence[int]], rank: int) -> list[Cut]:
    """Of tensors one after the other: [a, b, ...] is a matrix of a rows. What stays as it is, is joined."""
    cuts: list[Cut] = []
    start = 0
    for shape in shapes:
        size = math.prod(shape)
        rows, columns = (shape[0], size // max(1, shape[0])) if len(shape) > 1 else (size, 0)
        if columns and GAIN * rank * (rows + columns) <= rows * columns:
            cuts.append(Cut(start, rows, columns))
        elif cuts and not cuts[-1].columns:
            cuts[-1] = Cut(cuts[-1].start, cuts[-1].rows + size)
        elif size:
            cuts.append(Cut(start, size))
        start += size
    return cuts


def squarest(elements: int) -> list[tuple[int, ...]]:
    """Shapes for a vector of which nothing is known: a matrix as square as it gets, and the rest."""
    rows = math.isqrt(elements)
    columns = elements // rows if rows else 0
    return [(rows, columns), (elements - rows * columns,)]


@dataclass(frozen=True)
class LowRank:
    """``rank``: columns of the factors. ``seed``: of the first step's start, equal on all ranks."""

    rank: int = 4
    seed: int = 0
    name: ClassVar[str] = "powersgd"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"PowerSGD: rank must be at least 1, got {self.rank}.")

    def sizes(self, cuts: Sequence[Cut]) -> tuple[int, int]:
        """Elements of the first and of the second transfer."""
        first = sum((self.rank if cut.columns else 1) * cut.rows for cut in cuts)
        return first, sum(self.rank * cut.columns for cut in cuts)

    def bytes_sent(self, shapes: Sequence[Sequence[int]], world: int) -> int:
        return sum(raw_bytes(size, world) for size in self.sizes(cuts_of(shapes, self.rank)))


class LowRankReduction:
    def __init__(
        self, method: LowRank, shapes: Sequence[Sequence[int]], links: Links, device: torch.device, *, feedback: bool
    ) -> None:
        self._method, self._links, self._device = method, links, device
        self._cuts = cuts_of(shapes, method.rank)
        self._matrices = [cut for cut in self._cuts if cut.columns]
        first, second = method.sizes(self._cuts)
        self._p = torch.zeros(first, device=device)
        self._q = torch.zeros(second, device=device)
        self._first = RawReduction(first, links, device)
        self._second = RawReduction(second, links, device, first_stage=2)
        elements = sum(math.prod(shape) for shape in shapes)
        self.worker = torch.zeros(elements, device=device) if feedback else None
        for index, factor in enumerate(self._factors()):
            factor.copy_(start_of(factor.shape[1], method.rank, method.seed + index))

    def _factors(self) -> list[Tensor]:
        """Q^T [rank, columns] of each matrix: views."""
        rank = self._method.rank
        return [q.view(rank, -1) for q in torch.split(self._q, [cut.columns * rank for cut in self._matrices])]

    def _places(self) -> list[Tensor]:
        """Of each cut, in the first transfer: P^T [rank, rows], or the numbers themselves."""
        rank = self._method.rank
        pieces = torch.split(self._p, [cut.rows * (rank if cut.columns else 1) for cut in self._cuts])
        return [p.view(rank, -1) if cut.columns else p for cut, p in zip(self._cuts, pieces, strict=True)]

    @torch.no_grad()
    def steps(self, flat: Tensor, divisor: Divisor) -> Steps:
        if self._links.world == 1:
            flat.div_(divisor())
            return
        wanted = flat if self.worker is None else self.worker.add_(flat)
        factors, places = self._factors(), self._places()
        remaining = iter(factors)
        for cut, place in zip(self._cuts, places, strict=True):
            if cut.columns:  # the tall operand comes first, transposed: several times faster than the other way round
                torch.mm(next(remaining), cut.of(wanted).t(), out=place)
            else:
                place.copy_(cut.of(wanted))
        yield from self._first.steps(self._p, lambda: 1.0)
        by = divisor()
        bases = [orthonormal(place) for cut, place in zip(self._cuts, places, strict=True) if cut.columns]
        for cut, basis, factor in zip(self._matrices, bases, factors, strict=True):
            torch.mm(basis, cut.of(wanted), out=factor)
            if self.worker is not None:
                cut.of(wanted).addmm_(basis.t(), factor, alpha=-1.0).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        yield from self._second.steps(self._q, lambda: by)
        for cut, basis, factor in zip(self._matrices, bases, factors, strict=True):
            torch.mm(basis.t(), factor, out=cut.of(flat))
        for cut, place in zip(self._cuts, places, strict=True):
            if not cut.columns:
                torch.div(place, by, out=cut.of(flat))
                if self.worker is not None:
                    cut.of(self.worker).zero_()
        self._revive(factors)

    def _revive(self, factors: list[Tensor]) -> None:
        """A row that has become zero would stay so, and one that is not finite too: they start anew."""
        for index, factor in enumerate(factors):
            dead = ~factor.isfinite().all(dim=1, keepdim=True) | (factor == 0).all(dim=1, keepdim=True)
            fresh = start_of(factor.shape[1], self._method.rank, self._method.seed + index).to(factor.device)
            factor.copy_(torch.where(dead, fresh, factor))

    def state(self) -> dict[str, Tensor]:
        return {"start": self._q} | ({"worker": self.worker} if self.worker is not None else {})


@lru_cache(maxsize=256)
def start_of(columns: int, rank: int, seed: int) -> Tensor:
    """[rank, columns] drawn as whole numbers, whose bits are the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 20), 1 << 20, (rank, columns), generator=generator).float() / (1 << 20)


def orthonormal(rows: Tensor) -> Tensor:
    """[r, a] -> an orthonormal basis of the rows' span, in order (Gram-Schmidt, twice over, in float64).

    A row that adds nothing to those before it becomes zero; numbers that are not finite spread."""
    basis = rows.double()
    for i in range(len(basis)):
        row = basis[i].clone()
        before = row.norm()
        for _ in range(2):
            row -= (basis[:i] @ row) @ basis[:i]
        after = row.norm()
        scale = torch.where(after <= NOTHING_LEFT * before, torch.zeros_like(after), 1.0 / after)
        basis[i] = torch.where(scale == 0, torch.zeros_like(row), row * scale)
    return basis.float()
