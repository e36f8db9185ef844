"""Bringing the states of pieces together for a checkpoint by sending them."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from shoal.comm.group import Group
from shoal.comm.layout import Layout
from shoal.comm.slices import Piece, Sharing, pieces_of
from shoal.memory.shelves import Here, Shelf
from shoal.train.state_gathering import VECTORS, State, assembled, dtype_of, span, tell

_SENT = 1 << 18  # values at a time


class Sends(Protocol):
    """A lane, as far as it takes tensors from one worker to another."""

    def send(self, data: Tensor, to: int) -> None: ...
    def receive(self, out: Tensor, origin: int) -> None: ...


class SentStates:
    """For workers that share no memory, or whose states lie elsewhere: rank 0 of the group is sent what others hold."""

    on_heap = False

    def __init__(
        self,
        group: Group,
        lane: Sends,
        layout: Layout,
        parameters: Sequence[nn.Parameter],
        sharing: Sharing,
        shelf: Shelf | None = None,
    ) -> None:
        """``shelf``: where states lie, and are brought together, when that is not beside the computation."""
        self._group, self._lane, self._layout, self._sharing = group, lane, layout, sharing
        self._parameters, self._shelf = parameters, shelf
        self._pieces: dict[int, list[Piece]] = {}
        self._kept: dict[tuple[int, str], Tensor] = {}  # room on the shelf, from one checkpoint to the next

    def gather(self, pieces: Sequence[Piece], parts: Sequence[Tensor], states: Sequence[State]) -> dict[int, State]:
        """See `HostStates`; the pieces keep their states."""
        found = tell(self._group, pieces, parts, states)
        held = {(piece.slot, piece.start): state for piece, state in zip(pieces, states, strict=True)}
        wholes: dict[tuple[int, str], Tensor] = {}
        for slot in sorted(found):
            for key, (kind, dtype, *_) in sorted(found[slot].items()):
                if kind in VECTORS:
                    wholes[slot, key] = self._bring(slot, key, kind, dtype_of(dtype), held)
        return {} if self._group.rank else assembled(found, lambda slot, key, *_: wholes[slot, key])

    def _bring(
        self, slot: int, key: str, kind: str, dtype: torch.dtype, held: Mapping[tuple[int, int], State]
    ) -> Tensor:
        """Of one entry of a parameter's state, on rank 0 the whole."""
        parameter, own_rank = self._parameters[slot], self._group.rank
        every = span(kind, 0, parameter.numel())
        shape = parameter.shape if kind == "vector" else torch.Size((every.stop,))
        whole = self._room(slot, key, shape, dtype) if own_rank == 0 else torch.empty(0)
        for rank in range(self._group.world):
            for piece in self._pieces_of(rank, slot):
                at = span(kind, piece.start, piece.stop)
                for start in range(at.start, at.stop, _SENT):
                    stop = min(start + _SENT, at.stop)
                    own = None
                    if rank == own_rank:
                        own = self._read(held[slot, piece.start][key], start - at.start, stop - at.start)
                    if own_rank == 0:
                        whole = self._write(whole, start, stop, rank, own)
                    elif own is not None:
                        self._lane.send(own, 0)
        if own_rank == 0 and self._shelf is not None and self._shelf.holds(whole):
            self._kept[slot, key] = whole
            self._shelf.done([whole])
        return whole

    def _read(self, value: Tensor, start: int, stop: int) -> Tensor:
        if self._shelf is not None and self._shelf.holds(value):
            return self._shelf.read(value, start, stop)
        return value.view(-1)[start:stop]

    def _room(self, slot: int, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        kept, device = self._kept.get((slot, key)), self._parameters[slot].device
        if self._shelf is None:
            return torch.empty(shape, dtype=dtype, device=device)
        if kept is not None and kept.shape == shape and kept.dtype == dtype:
            return kept
        try:
            return self._shelf.make(shape, dtype)
        except OSError:  # no room: in memory nothing is lost
            return torch.empty(shape, dtype=dtype, device=device)

    def _write(self, whole: Tensor, start: int, stop: int, rank: int, own: Tensor | None) -> Tensor:
        """On rank 0, what ``rank`` has: ``own``, or what it sends. The whole; in memory, should the disk give out."""
        onto = self._shelf if self._shelf is not None and self._shelf.holds(whole) else None
        if own is None:
            own = whole.view(-1)[start:stop]
            if onto is not None:
                own = torch.empty(stop - start, dtype=whole.dtype, device=self._parameters[0].device)
            self._lane.receive(own, rank)
        try:
            (onto or Here(whole.device)).write(whole, start, own)
        except OSError:
            whole = whole.clone()
            Here(whole.device).write(whole, start, own)
        return whole

    def _pieces_of(self, rank: int, slot: int) -> list[Piece]:
        if rank not in self._pieces:
            self._pieces[rank] = pieces_of(self._layout, self._sharing.slices(rank))
        return [piece for piece in self._pieces[rank] if piece.slot == slot]
