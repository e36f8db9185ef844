"""Bringing the states of pieces together for a checkpoint by sending them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shoal.comm.lanes import LanedGroup
from shoal.comm.layout import Layout
from shoal.comm.slices import Piece, Sharing, pieces_of
from shoal.train.state_gathering import State, assembled, dtype_of, tell


class SentStates:
    """Workers that share no memory: rank 0 of the group is sent what the others hold."""

    def __init__(self, group: LanedGroup, layout: Layout, parameters: Sequence[nn.Parameter], sharing: Sharing) -> None:
        self._group, self._layout, self._parameters, self._sharing = group, layout, parameters, sharing
        self._lane = group.lane(shared=True)
        self._pieces: dict[int, list[Piece]] = {}

    def gather(self, pieces: Sequence[Piece], parts: Sequence[Tensor], states: Sequence[State]) -> dict[int, State]:
        """See `HostStates`; the pieces keep their states."""
        found = tell(self._group, pieces, parts, states)
        vectors = [(slot, key, told[1]) for slot in sorted(found) for key, told in sorted(found[slot].items())
                   if told[0] == "vector"]  # fmt: skip
        held = {(piece.slot, piece.start): state for piece, state in zip(pieces, states, strict=True)}
        wholes: dict[tuple[int, str], Tensor] = {}
        for slot, key, dtype in vectors:
            parameter = self._parameters[slot]
            if self._group.rank == 0:
                wholes[slot, key] = torch.empty(parameter.numel(), dtype=dtype_of(dtype), device=parameter.device)
            for rank in range(self._group.world):
                for piece in self._pieces_of(rank, slot):
                    own = held[slot, piece.start][key].view(-1) if rank == self._group.rank else None
                    into = wholes[slot, key][piece.start : piece.stop] if self._group.rank == 0 else None
                    self._move(rank, own, into)
        return {} if self._group.rank else assembled(found, lambda slot, key, _: wholes[slot, key].view(
            self._parameters[slot].shape))  # fmt: skip

    def _pieces_of(self, rank: int, slot: int) -> list[Piece]:
        if rank not in self._pieces:
            self._pieces[rank] = pieces_of(self._layout, self._sharing.slices(rank))
        return [piece for piece in self._pieces[rank] if piece.slot == slot]

    def _move(self, rank: int, own: Tensor | None, into: Tensor | None) -> None:
        """From a rank to rank 0."""
        if rank == 0:
            if own is not None and into is not None:
                into.copy_(own)
        elif own is not None:
            self._lane.send(own, 0)
        elif into is not None:
            self._lane.receive(into, rank)
