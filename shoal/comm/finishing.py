"""Finishing a worker's slice of the flat buffer: the tree's additions, the division, the sums of squares of blocks.

A slice is a list of pieces: a piece is a run of one slot inside of one block. Its operands may lie anywhere, each
slot's by itself. With the C++ kernels a slice is one call and one pass over memory; without them it is torch, to the
same bits.
"""

import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from shoal.comm.layout import BLOCK, Layout, Slot
from shoal.comm.native import build
from shoal.comm.tree import Add

LANES = 2048  # a block is rows of so many elements: their squares are added row by row, then the lanes in halves


@dataclass(frozen=True)
class Slice:
    """The pieces of ``start .. stop`` of a flat buffer, in order: [pieces] each, in elements."""

    start: int
    stop: int
    slots: np.ndarray  # int64: which slot a piece belongs to
    offsets: np.ndarray  # int64: where in the slot it starts
    places: np.ndarray  # int64 [pieces, 2]: where in the slice it starts, and how long it is


def slice_of(layout: Layout, start: int, stop: int) -> Slice:
    """The pieces of a slice of whole blocks."""
    rows = []
    for index, slot in enumerate(layout.slots):
        position, end = max(slot.offset, start), min(slot.offset + slot.size, stop)
        while position < end:
            cut = min(end, (position // BLOCK + 1) * BLOCK)
            rows.append((index, position - slot.offset, position - start, cut - position))
            position = cut
    table = np.array(sorted(rows, key=lambda row: row[2]), dtype=np.int64).reshape(-1, 4)
    return Slice(start, stop, table[:, 0].copy(), table[:, 1].copy(), np.ascontiguousarray(table[:, 2:]))


def block_squares(flat: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each block of ``flat`` [blocks * BLOCK], float64 [blocks].

    In float64 and one order of additions: neither the processor nor a library chooses it."""
    squares = torch.empty(len(flat) // BLOCK, dtype=torch.float64, device=flat.device)
    finish_flat([flat], (), 1.0, squares)
    return squares


def _block_squares(flat: torch.Tensor) -> torch.Tensor:
    values = flat.to(torch.float64)
    rows = (values * values).view(-1, BLOCK // LANES, LANES)
    lanes = rows[:, 0]
    for row in range(1, rows.shape[1]):
        lanes = lanes + rows[:, row]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes.reshape(-1)


def global_norm(squares: Iterable[float]) -> float:
    """From the sums of squares of all blocks; fsum rounds once, so that neither order nor padding matters."""
    numbers = list(squares)
    if not all(map(math.isfinite, numbers)):
        return math.nan
    return math.sqrt(math.fsum(numbers))


def fast_path(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `finish_pieces` can be used."""
    return dtype in _FUNCTIONS and device.type == "cpu" and build.kernels() is not None


_FUNCTIONS = {torch.float32: "shoal_finish_f32", torch.float64: "shoal_finish_f64"}


def finish_pieces(
    piece: Slice,
    addresses: np.ndarray,
    dtype: torch.dtype,
    adds: Sequence[Add],
    by: float,
    squares: torch.Tensor | None,
) -> None:
    """In place, in C++: add operands in order, divide operand 0 by ``by``, and put its blocks' sums of squares into
    ``squares`` (float64 [blocks of the slice]). ``addresses`` is uint64 [operands, slots]: where each slot starts."""
    library = build.kernels()
    assert library is not None, "fast_path was not asked"
    pointers = np.ascontiguousarray((addresses[:, piece.slots] + (piece.offsets * dtype.itemsize).astype(np.uint64)).T)
    order = np.array(adds, dtype=np.int32)
    getattr(library, _FUNCTIONS[dtype])(
        ctypes.c_int64(len(piece.slots)),
        ctypes.c_void_p(piece.places.ctypes.data),
        ctypes.c_void_p(pointers.ctypes.data),
        ctypes.c_int64(len(addresses)),
        ctypes.c_int64(len(adds)),
        ctypes.c_void_p(order.ctypes.data),
        ctypes.c_double(by),
        ctypes.c_void_p(squares.data_ptr() if squares is not None else None),
    )


@torch.no_grad()
def finish_flat(
    operands: Sequence[torch.Tensor], adds: Sequence[Add], by: float, squares: torch.Tensor | None = None
) -> None:
    """The same on operands that are flat slices of whole blocks; without the kernels by torch, to the same bits."""
    first = operands[0]
    if fast_path(first.dtype, first.device):
        addresses = np.array([[operand.data_ptr()] for operand in operands], dtype=np.uint64)
        finish_pieces(_whole(len(first)), addresses, first.dtype, adds, by, squares)
        return
    for blocks in zip(*(torch.split(operand, BLOCK) for operand in operands), strict=True):
        for add in adds:
            blocks[add.into].add_(blocks[add.other])
        if by != 1.0:
            blocks[0].div_(by)
    if squares is not None:
        squares.copy_(_block_squares(first))


@lru_cache(maxsize=64)
def _whole(elements: int) -> Slice:
    """A slice that is one slot."""
    return slice_of(Layout((Slot(0, elements),), elements, ()), 0, elements)
