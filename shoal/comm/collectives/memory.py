"""Where the chunks of a rank are while a program runs: pieces of flat tensors, and temporary ones used again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.comm.collectives.actions import Span
from shoal.errors import UserError


class Piece(NamedTuple):
    """The elements ``start <= element < stop`` of a flat tensor."""

    buffer: Tensor
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def view(self) -> Tensor:
        whole = self.start == 0 and self.stop == self.buffer.numel()
        return self.buffer if whole else self.buffer[self.start : self.stop]

    def part(self, start: int, stop: int) -> "Piece":
        return Piece(self.buffer, self.start + start, self.start + stop)


def lay(buffer: Tensor | None, chunks: Iterable[int], spans: Sequence[Span], what: str) -> dict[int, Piece]:
    """The pieces of a flat ``buffer`` that holds ``chunks`` one after the other.

    Raises UserError when they do not fill it."""
    pieces: dict[int, Piece] = {}
    at = 0
    for chunk in chunks:
        start, stop = spans[chunk]
        if buffer is not None:
            pieces[chunk] = Piece(buffer, at, at + stop - start)
        at += stop - start
    have = 0 if buffer is None else buffer.numel()
    if at != have:
        raise UserError(f"{what} must have {at} elements on this rank, got {have}.")
    return pieces


def joined(pieces: Sequence[Piece]) -> Piece | None:
    """One piece, when they follow each other in one buffer."""
    buffer, start, stop = pieces[0]
    for piece in pieces[1:]:
        if piece.buffer is not buffer or piece.start != stop:
            return None
        stop = piece.stop
    return Piece(buffer, start, stop)


class Memory:
    """The chunks of one rank. ``home`` are the places of the chunks that it ends with."""

    def __init__(self, held: Mapping[int, Piece], home: Mapping[int, Piece], dtype: torch.dtype, device: torch.device):
        self.held, self.home = dict(held), home
        self.dtype, self.device = dtype, device
        self._fixed = {id(piece.buffer) for piece in (*held.values(), *home.values())}
        self._users: dict[int, int] = {}  # of a temporary buffer, by id: pieces in use
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def own(self, piece: Piece) -> bool:
        """It may be overwritten: it is not what the caller gave us to read."""
        return id(piece.buffer) in self._users

    def take(self, size: int, dtype: torch.dtype | None = None) -> Piece:
        """A temporary piece. Whoever takes it drops it, or puts it, or parts of it, where a chunk is."""
        dtype = dtype or self.dtype
        waiting = self._free.get((size, dtype))
        buffer = waiting.pop() if waiting else torch.empty(size, dtype=dtype, device=self.device)
        self._users[id(buffer)] = 1
        return Piece(buffer, 0, size)

    def drop(self, piece: Piece) -> None:
        key = id(piece.buffer)
        if key in self._users:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._free.setdefault((piece.buffer.numel(), piece.buffer.dtype), []).append(piece.buffer)

    def put(self, chunk: int, piece: Piece) -> None:
        """The chunk is there from now on."""
        if id(piece.buffer) in self._users:
            self._users[id(piece.buffer)] += 1
        self.forget(chunk)
        self.held[chunk] = piece

    def forget(self, chunk: int) -> None:
        old = self.held.pop(chunk, None)
        if old is not None:
            self.drop(old)

    def runs(self, *columns: Sequence[Piece]) -> Iterator[tuple[Piece, ...]]:
        """Rows of pieces, those that follow each other in every column joined into one."""
        rows = list(zip(*columns, strict=True))
        run: tuple[Piece, ...] | None = None
        for row in rows:
            if not row[0].size:
                continue
            if run is not None and all(
                p.buffer is q.buffer and p.stop == q.start for p, q in zip(run, row, strict=True)
            ):
                run = tuple(Piece(p.buffer, p.start, q.stop) for p, q in zip(run, row, strict=True))
                continue
            if run is not None:
                yield run
            run = row
        if run is not None:
            yield run
