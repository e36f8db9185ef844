"""What each worker alone holds, copied after each step into memory of the host that outlives every worker.

The memory is a file without a name that the agent keeps. It has two halves, for two epochs: one that is trained in
writes its half, and the other one is let go of once this one has a whole step. A half has two versions, written in
turns: a worker that dies while it writes the newer one leaves the older one whole. A version is whole when all workers
of its epoch that are kept here have marked the same step in it; nobody writes a step before the one before it is
whole, because a step ends in an exchange that all take part in.

On one host all workers are kept. Of several hosts each keeps its own workers and those that others have sent it a copy
of (`shoal.elastic.peer_copies`).

    page 0            of each half: workers of its epoch, where that begins, its number, and the step that each worker
                      has marked in each version
    then, a region    for each half, version and rank (`shoal.elastic.mirror_regions`)
"""

import ctypes
import mmap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.comm.heap import PAGE
from shoal.elastic.mirror_regions import REGION, Packed, Pen, packed, parts_of
from shoal.errors import ShoalError
from shoal.train.checkpoint import Checkpoint
from shoal.train.held_parts import HeldPart

MOST_RANKS = 160
_WORLD, _BEGINS, _EPOCH, _MARKS = range(4)  # numbers of a half; then two marks of each worker
_ROW = _MARKS + 2 * MOST_RANKS
_NEVER, _ELSEWHERE = -1, -2  # marks: nothing yet; not kept here
_PUNCH = 0x01 | 0x02  # fallocate: give pages back, keep the file's size


@dataclass(frozen=True)
class _Version:
    half: int
    number: int
    step: int
    world: int


@dataclass(frozen=True)
class Kept:
    """What a worker held after a step, in memory of some host."""

    epoch: int
    world: int
    rank: int
    step: int


class Mirror:
    """One worker's hand on the memory, a file of `heap_file`.

    `enter` begins an epoch, `write` follows each step, `read` precedes the next epoch."""

    def __init__(self, file: int) -> None:
        self._file = file
        size = 2 * _ROW
        header = mmap.mmap(file, -(-size * 8 // PAGE) * PAGE)
        self._header = np.frombuffer(header, dtype=np.int64, count=size).reshape(2, _ROW)
        self._half = 0
        self._rank = self._world = 0
        self._pens: dict[tuple[int, int], Pen] = {}  # of each version and rank that this worker writes
        self._other_half = True  # still holds what the epoch began from

    # --- what is whole ----------------------------------------------------------------------------------------

    def _versions(self) -> list[_Version]:
        found = []
        for half in range(2):
            world = int(self._header[half, _WORLD])
            for number in range(2):
                marks = self._marks(half, number)[:world]
                marks = marks[marks != _ELSEWHERE]
                if len(marks) and (marks == marks[0]).all() and marks[0] > _NEVER:
                    found.append(_Version(half, number, int(marks[0]), world))
        return found

    def _marks(self, half: int, number: int) -> np.ndarray:
        start = _MARKS + number * MOST_RANKS
        row: np.ndarray = self._header[half, start : start + MOST_RANKS]
        return row

    @property
    def newest(self) -> int:
        """The newest step that is whole, as far as it is kept here; -1 for none."""
        return max((version.step for version in self._versions()), default=_NEVER)

    def _whole(self, step: int) -> _Version:
        for version in self._versions():
            if version.step == step:
                return version
        raise ShoalError(f"the memory that mirrors the workers' states does not have step {step}")

    # --- an epoch ---------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything: the run starts over, or from a checkpoint. One worker does it, before `enter` of all."""
        self._header[:, _WORLD] = 0

    @property
    def begins(self) -> int:
        """The step that this epoch goes on from, once somebody who knows it has entered."""
        return int(self._header[self._half, _BEGINS])

    def enter(
        self,
        rank: int,
        world: int,
        step: int,
        begins: int | None,
        *,
        epoch: int = 0,
        wards: Collection[int] = (),
        elsewhere: Collection[int] = (),
    ) -> None:
        """Begin an epoch that goes on from a whole ``step``, -1: from nothing here, but perhaps from a checkpoint of
        step ``begins``, None of who does not know it and leaves it to the others of this host. Before the first `write`
        of anybody, all must have entered.

        Of several hosts: the number of the epoch, the ranks that this worker keeps copies of, and those that this host
        keeps nothing of."""
        self._half = 1 - self._whole(step).half if step > _NEVER else 0
        self._rank, self._world = rank, world
        own = (rank, *wards)
        self._pens = {(n, each): Pen(self._file, _region(self._half, n, each)) for n in range(2) for each in own}
        for number in range(2):
            marks = self._marks(self._half, number)
            marks[list(own)], marks[list(elsewhere)] = _NEVER, _ELSEWHERE
        if begins is not None:
            self._header[self._half, _BEGINS] = begins
        self._header[self._half, _EPOCH] = epoch
        self._header[self._half, _WORLD] = world
        self._other_half = True

    def write(self, step: int, parts: Sequence[HeldPart], facts: Mapping[str, Any]) -> Packed:
        """Copy what this worker holds after ``step``; the copy, valid until the next but one."""
        if self._other_half and self.newest == step - 1 and self._whole(step - 1).half == self._half:
            self._other_half = False
            if self._rank == 0:
                self._let_go(1 - self._half)
        marks = self._marks(self._half, step % 2)
        marks[self._rank] = _NEVER  # what is half written is not the older step any more
        written = self._pens[step % 2, self._rank].write(parts, facts)
        marks[self._rank] = step
        return written

    def take(self, ward: int, step: int, table: bytes, facts: bytes, size: int) -> memoryview:
        """Room for a copy of what a ward holds after ``step``: fill it, then `taken`."""
        self._marks(self._half, step % 2)[ward] = _NEVER
        return self._pens[step % 2, ward].take(table, facts, size)

    def taken(self, ward: int, step: int) -> None:
        self._marks(self._half, step % 2)[ward] = step

    def _let_go(self, half: int) -> None:
        """The memory of an older epoch."""
        self._header[half, _WORLD] = 0
        libc = ctypes.CDLL(None)
        if hasattr(libc, "fallocate"):  # elsewhere it stays until the epoch after the next writes over it
            start, size = _region(half, 0, 0), 2 * MOST_RANKS * REGION
            libc.fallocate(self._file, _PUNCH, ctypes.c_int64(start), ctypes.c_int64(size))

    # --- back -------------------------------------------------------------------------------------------------

    def read(self, step: int) -> Checkpoint:
        """All that the workers of the epoch held after a whole ``step``, put together; facts are those of rank 0,
        with the plain values of the optimiser of all. What was not cut lies where it is: copy it."""
        version = self._whole(step)
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        values: dict[str, Any] = {}
        aliases: dict[str, str] = {}
        for rank in reversed(range(version.world)):
            told, found = parts_of(packed(self._file, _region(version.half, version.number, rank)))
            values |= told["optimizer"]["values"]
            aliases |= told["aliases"]
            facts = told
            for part in found:
                if part.tensor.numel() == prod(part.shape):
                    tensors[part.name] = part.tensor.view(part.shape)
                    continue
                if part.name not in tensors:
                    tensors[part.name] = torch.empty(part.shape, dtype=part.tensor.dtype)
                tensors[part.name].view(-1)[part.start : part.start + part.tensor.numel()] = part.tensor
        tensors |= {alias: tensors[name] for alias, name in aliases.items()}
        return Checkpoint(tensors, {**facts, "optimizer": {**facts["optimizer"], "values": values}})

    # --- of several hosts -------------------------------------------------------------------------------------

    def inventory(self) -> list[Kept]:
        """All that lies here and is not being written."""
        found = []
        for half in range(2):
            epoch, world = int(self._header[half, _EPOCH]), int(self._header[half, _WORLD])
            for number in range(2):
                for rank, step in enumerate(self._marks(half, number)[:world].tolist()):
                    if step > _NEVER:
                        found.append(Kept(epoch, world, rank, step))
        return found

    def packed(self, kept: Kept) -> Packed:
        return packed(self._file, _region(self._half_of(kept.epoch), kept.step % 2, kept.rank))

    def adopt(self, epoch: int, world: int, step: int, missing: Collection[int]) -> dict[int, Pen]:
        """To have all of an epoch's ``step`` here: pens for the ranks that are ``missing``, for others' copies.

        Nothing else is gone on from any more. One worker of the host does it, the others wait until `adopted`."""
        half = self._half_of(epoch)
        if half < 0:
            half = int(self._header[:, _EPOCH].argmin())
            for number in range(2):
                self._marks(half, number)[:] = _ELSEWHERE
            self._header[half, _EPOCH], self._header[half, _WORLD] = epoch, world
        return {rank: Pen(self._file, _region(half, step % 2, rank)) for rank in missing}

    def adopted(self, epoch: int, step: int) -> None:
        half = self._half_of(epoch)
        self._header[1 - half, _WORLD] = 0
        self._marks(half, 1 - step % 2)[:] = _ELSEWHERE
        self._marks(half, step % 2)[: int(self._header[half, _WORLD])] = step

    def _half_of(self, epoch: int) -> int:
        """-1: nothing of it is here."""
        for half in range(2):
            if self._header[half, _WORLD] and self._header[half, _EPOCH] == epoch:
                return half
        return -1


def _region(half: int, number: int, rank: int) -> int:
    """Where it begins in the file."""
    return (1 + (2 * half + number) * MOST_RANKS + rank) * REGION
