"""What one worker holds after a step, as bytes in a file without a name: its region of a version of the mirror.

page 0      sizes of what follows
_TABLE      which parts there are, and where each one's numbers lie
_FACTS      plain facts
_NUMBERS    the parts' numbers
"""

import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.comm.heap import PAGE
from shoal.train.held_parts import HeldPart

REGION = 1 << 40  # bytes of addresses; what is not touched costs nothing
_ALIGNED = 64
_SIZES = struct.Struct("<qqq")  # of the table, of the facts, and of the numbers, in bytes
_TABLE, _FACTS, _NUMBERS = 1 << 34, 2 << 34, 3 << 34  # where in a region each of these begins


@dataclass(frozen=True)
class Packed:
    """A region's bytes, as another host is sent them."""

    table: bytes
    facts: bytes
    numbers: memoryview


class Pen:
    """Writes the region that begins at ``start`` of the file. Where everything lies is decided anew only when other
    parts come than the last time."""

    def __init__(self, file: int, start: int) -> None:
        self._file, self._start = file, start
        self._sizes = mmap.mmap(file, PAGE, offset=start)
        self._facts = mmap.mmap(file, PAGE, offset=start + _FACTS)
        self._form: list[Any] | None = None
        self._parts: Sequence[HeldPart] = ()  # of the last time
        self._table = b""
        self._memory = _numbers(file, start, 0)
        self._end = 0
        self._places: list[Tensor] = []

    def write(self, parts: Sequence[HeldPart], facts: Mapping[str, Any]) -> Packed:
        """What was written, valid until the next write."""
        if parts is not self._parts:
            form = [(p.name, p.start, p.shape, p.tensor.shape, p.tensor.dtype) for p in parts]
            if form != self._form:
                self._lay_out(parts)
            self._form, self._parts = form, parts
        if parts:
            with torch.no_grad():
                torch._foreach_copy_(self._places, [part.tensor for part in parts])
        raw = json.dumps(facts).encode()
        self._write_facts(raw)
        return Packed(self._table, raw, memoryview(self._memory)[: self._end])

    def take(self, table: bytes, facts: bytes, size: int) -> memoryview:
        """A region that another worker has written: the room for its numbers, which are then to be put there."""
        if table != self._table or size != self._end:
            self._set_table(table)
            self._memory, self._end = _numbers(self._file, self._start, size), size
        self._write_facts(facts)
        return memoryview(self._memory)[:size]

    def _write_facts(self, raw: bytes) -> None:
        if len(raw) > len(self._facts):
            self._facts = mmap.mmap(self._file, -(-2 * len(raw) // PAGE) * PAGE, offset=self._start + _FACTS)
        self._facts[: len(raw)] = raw
        _SIZES.pack_into(self._sizes, 0, len(self._table), len(raw), self._end)

    def _set_table(self, table: bytes) -> None:
        mmap.mmap(self._file, len(table), offset=self._start + _TABLE)[:] = table
        self._table = table

    def _lay_out(self, parts: Sequence[HeldPart]) -> None:
        rows: list[list[Any]] = []
        end = 0
        for part in parts:
            dtype = str(part.tensor.dtype).removeprefix("torch.")
            rows.append([part.name, part.start, list(part.shape), part.tensor.numel(), dtype, end])
            end += -(-part.tensor.nbytes // _ALIGNED) * _ALIGNED
        self._set_table(json.dumps(rows).encode())
        self._memory, self._end = _numbers(self._file, self._start, end), end
        self._places = [_at(self._memory, row[5], part.tensor) for row, part in zip(rows, parts, strict=True)]


def _numbers(file: int, start: int, size: int) -> mmap.mmap:
    return mmap.mmap(file, max(size, 1), offset=start + _NUMBERS)


def _at(memory: mmap.mmap, place: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty_like(like)
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=place).view(like.shape)


def packed(file: int, start: int) -> Packed:
    """A region as it lies there."""
    table_size, facts_size, size = _SIZES.unpack_from(mmap.mmap(file, PAGE, offset=start), 0)
    facts = mmap.mmap(file, facts_size, offset=start + _FACTS)[:]
    table = mmap.mmap(file, table_size, offset=start + _TABLE)[:]
    return Packed(table, facts, memoryview(_numbers(file, start, size))[:size])


def parts_of(region: Packed) -> tuple[dict[str, Any], list[HeldPart]]:
    """Its facts and its parts, whose tensors lie where the region lies."""
    found = []
    for name, first, shape, count, kind, place in json.loads(region.table):
        dtype: torch.dtype = getattr(torch, kind)
        lies = torch.frombuffer(region.numbers, dtype=dtype, count=count, offset=place) if count else None
        found.append(HeldPart(name, tuple(shape), first, torch.empty(0, dtype=dtype) if lies is None else lies))
    return json.loads(region.facts), found
