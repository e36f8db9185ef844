"""What each worker alone holds, copied after each step into memory of the host that outlives every worker.

The memory is a file without a name that the agent keeps. It has two halves, for two epochs: one that is trained in
writes its half, and the other one is let go of once this one has a whole step. A half has two versions, written in
turns: a worker that dies while it writes the newer one leaves the older one whole. A version is whole when all workers
of its epoch have marked the same step in it; nobody writes a step before the one before it is whole, because a step
ends in an exchange that all take part in.

    page 0            of each half: workers of its epoch, and the step that each has marked in each version
    then, a region    for each half, version and rank: sizes, a table of parts, plain facts, and the parts' numbers
"""

import ctypes
import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.comm.heap import PAGE
from shoal.errors import ShoalError
from shoal.train.checkpoint import Checkpoint
from shoal.train.held_parts import HeldPart

MOST_RANKS = 160
_ROW = 2 + 2 * MOST_RANKS  # numbers of a half: workers, the step it begins from, and two marks of each worker
_REGION = 1 << 40  # bytes of addresses; what is not touched costs nothing
_ALIGNED = 64
_NEVER = -1
_SIZES = struct.Struct("<qq")  # of the table and of the facts, in bytes
_PUNCH = 0x01 | 0x02  # fallocate: give pages back, keep the file's size


@dataclass(frozen=True)
class _Version:
    half: int
    number: int
    step: int
    world: int


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
        self._pens: list[_Pen] = []
        self._other_half = True  # still holds what the epoch began from

    # --- what is whole ----------------------------------------------------------------------------------------

    def _versions(self) -> list[_Version]:
        found = []
        for half in range(2):
            world = int(self._header[half, 0])
            for number in range(2):
                marks = self._marks(half, number)[:world]
                if world and (marks == marks[0]).all() and marks[0] > _NEVER:
                    found.append(_Version(half, number, int(marks[0]), world))
        return found

    def _marks(self, half: int, number: int) -> np.ndarray:
        start = 2 + number * MOST_RANKS
        row: np.ndarray = self._header[half, start : start + MOST_RANKS]
        return row

    @property
    def newest(self) -> int:
        """The newest step that is whole; -1 for none."""
        return max((version.step for version in self._versions()), default=_NEVER)

    def _whole(self, step: int) -> _Version:
        for version in self._versions():
            if version.step == step:
                return version
        raise ShoalError(f"the memory that mirrors the workers' states does not have step {step}")

    # --- an epoch ---------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything: the run starts over, or from a checkpoint. One worker does it, before `enter` of all."""
        self._header[:, 0] = 0

    @property
    def begins(self) -> int:
        """The step that this epoch goes on from, once its rank 0 has entered."""
        return int(self._header[self._half, 1])

    def enter(self, rank: int, world: int, step: int, begins: int) -> None:
        """Begin an epoch that goes on from a whole ``step``, -1: from nothing here, but perhaps from a checkpoint of
        step ``begins``. Before the first `write` of anybody, all must have entered."""
        self._half = 1 - self._whole(step).half if step > _NEVER else 0
        self._rank, self._world = rank, world
        self._pens = [_Pen(self._file, _region(self._half, number, rank)) for number in range(2)]
        for number in range(2):
            self._marks(self._half, number)[rank] = _NEVER
        if rank == 0:
            self._header[self._half, 1] = begins
        self._header[self._half, 0] = world
        self._other_half = True

    def write(self, step: int, parts: Sequence[HeldPart], facts: Mapping[str, Any]) -> None:
        """Copy what this worker holds after ``step``."""
        if self._other_half and self.newest == step - 1 and self._whole(step - 1).half == self._half:
            self._other_half = False
            if self._rank == 0:
                self._let_go(1 - self._half)
        self._pens[step % 2].write(parts, facts)
        self._marks(self._half, step % 2)[self._rank] = step

    def _let_go(self, half: int) -> None:
        """The memory of an older epoch."""
        self._header[half, 0] = 0
        libc = ctypes.CDLL(None)
        if hasattr(libc, "fallocate"):  # elsewhere it stays until the epoch after the next writes over it
            start, size = _region(half, 0, 0), 2 * MOST_RANKS * _REGION
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
            told, found = _read(self._file, _region(version.half, version.number, rank))
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


def _region(half: int, number: int, rank: int) -> int:
    """Where it begins in the file."""
    return (1 + (2 * half + number) * MOST_RANKS + rank) * _REGION


_TABLE = 1 << 34  # where in a region each of these begins
_FACTS = 2 << 34
_NUMBERS = 3 << 34


class _Pen:
    """Writes one region. Where everything lies is decided anew only when other parts come than the last time."""

    def __init__(self, file: int, start: int) -> None:
        self._file, self._start = file, start
        self._sizes = mmap.mmap(file, PAGE, offset=start)
        self._facts = mmap.mmap(file, PAGE, offset=start + _FACTS)
        self._form: list[Any] | None = None
        self._table_size = 0
        self._places: list[Tensor] = []

    def write(self, parts: Sequence[HeldPart], facts: Mapping[str, Any]) -> None:
        form = [(p.name, p.start, p.shape, p.tensor.shape, p.tensor.dtype) for p in parts]
        if form != self._form:
            self._lay_out(parts)
            self._form = form
        with torch.no_grad():
            for place, part in zip(self._places, parts, strict=True):
                place.copy_(part.tensor)
        raw = json.dumps(facts).encode()
        if len(raw) > len(self._facts):
            self._facts = mmap.mmap(self._file, -(-2 * len(raw) // PAGE) * PAGE, offset=self._start + _FACTS)
        self._facts[: len(raw)] = raw
        _SIZES.pack_into(self._sizes, 0, self._table_size, len(raw))

    def _lay_out(self, parts: Sequence[HeldPart]) -> None:
        rows: list[list[Any]] = []
        end = 0
        for part in parts:
            dtype = str(part.tensor.dtype).removeprefix("torch.")
            rows.append([part.name, part.start, list(part.shape), part.tensor.numel(), dtype, end])
            end += -(-part.tensor.nbytes // _ALIGNED) * _ALIGNED
        table = json.dumps(rows).encode()
        self._table_size = len(table)
        mmap.mmap(self._file, len(table), offset=self._start + _TABLE)[:] = table
        memory = _numbers(self._file, self._start, end)
        self._places = [_at(memory, row[5], part.tensor) for row, part in zip(rows, parts, strict=True)]


def _numbers(file: int, start: int, size: int) -> mmap.mmap:
    return mmap.mmap(file, max(size, 1), offset=start + _NUMBERS)


def _at(memory: mmap.mmap, place: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty_like(like)
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=place).view(like.shape)


def _read(file: int, start: int) -> tuple[dict[str, Any], list[HeldPart]]:
    table_size, facts_size = _SIZES.unpack_from(mmap.mmap(file, PAGE, offset=start), 0)
    facts = json.loads(mmap.mmap(file, facts_size, offset=start + _FACTS)[:])
    rows = json.loads(mmap.mmap(file, table_size, offset=start + _TABLE)[:])
    kinds = [torch.empty(0, dtype=getattr(torch, row[4])) for row in rows]
    end = max((row[5] + row[3] * kind.element_size() for row, kind in zip(rows, kinds, strict=True)), default=0)
    memory = _numbers(file, start, end)
    found = []
    for (name, first, shape, count, _, place), kind in zip(rows, kinds, strict=True):
        tensor = torch.frombuffer(memory, dtype=kind.dtype, count=count, offset=place) if count else kind
        found.append(HeldPart(name, tuple(shape), first, tensor))
    return facts, found
