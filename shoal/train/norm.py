"""The global norm of a gradient that lies on several workers in parts, and what any of them was asked for."""

import json
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.comm.accounting.split_account import SplitAccount
from shoal.comm.finishing import block_squares, global_norm
from shoal.comm.group import Group
from shoal.comm.layout import BLOCK
from shoal.comm.slices import Piece, pieces_of
from shoal.train.gradients import Gradients

_HEAD = struct.Struct("<BII")  # what was asked for; how many sums of squares follow; bytes of the account behind them
STOP, CHANGE, WRONG = 1, 2, 4  # what a worker may be asked for (see `StepFigures`), or know of a step


class Norm(Protocol):
    def __call__(self, squares: Sequence[Tensor], asked: int) -> tuple[float, int]:
        """From each set's `Gradients.reduce`: the norm over all workers, and what any of them is asked for.

        Called by all of them, after the gradients have been reduced and before they are hung up. A worker reads its own
        slices of the result alone: nobody else scales them, and under sharded states nobody else has them."""


class NormAlone:
    """This worker's sets are the whole gradient."""

    def __call__(self, squares: Sequence[Tensor], asked: int) -> tuple[float, int]:
        return global_norm(chain.from_iterable(each.tolist() for each in squares)), asked


class NormOverStages:
    """Each replica's workers have some parameters whole each: the norm has the bits that one with all of them finds.

    Sums of squares of whole blocks are what it takes. A block that lies on several chunks is put together first."""

    def __init__(
        self,
        group: Group,
        sets: Sequence[Gradients],
        blocks: Sequence[Sequence[int]],
        ranks: Sequence[int],
        account: SplitAccount,
    ) -> None:
        """``group``: all workers. ``blocks``: of each set, the numbers in the whole layout; ``ranks``: this worker's
        among those that sum the set."""
        self._group, self._sets, self._account = group, sets, account
        counted = [numbers for numbers, rank in zip(blocks, ranks, strict=True) if rank == 0]
        told = [json.loads(row) for row in group.gather(json.dumps(list(chain.from_iterable(counted))).encode())]
        held = Counter(chain.from_iterable(told))
        self._whole = [
            [i for i, number in enumerate(numbers) if held[number] == 1 and rank == 0]
            for numbers, rank in zip(blocks, ranks, strict=True)
        ]
        self._pieces: list[tuple[Gradients, Piece]] = []
        places = []  # (block, from, to) of each piece in its block
        for gradients, numbers, rank in zip(sets, blocks, ranks, strict=True):
            for piece in chain.from_iterable(map(_in_blocks, pieces_of(gradients.layout, [rank]))):
                number = numbers[piece.place // BLOCK]
                if held[number] > 1:
                    self._pieces.append((gradients, piece))
                    start = piece.place % BLOCK
                    places.append((number, start, start + piece.length))
        self._places = [json.loads(row) for row in group.gather(json.dumps(places).encode())]

    def __call__(self, squares: Sequence[Tensor], asked: int) -> tuple[float, int]:
        own = torch.cat([each[index] for each, index in zip(squares, self._whole, strict=True)]).numpy()
        values = [_read(gradients, piece).cpu().numpy() for gradients, piece in self._pieces]
        rows = _all_rows(self._group, self._account, asked, own, values)
        dtype = self._sets[0].dtype
        numbers: list[float] = []
        shared: dict[int, Tensor] = {}
        for row, places in zip(rows, self._places, strict=True):
            asked |= row.asked
            numbers += row.squares
            rest = torch.frombuffer(bytearray(row.rest) or bytearray(1), dtype=torch.uint8)
            at = 0
            for block, start, end in places:
                size = (end - start) * dtype.itemsize
                into = shared.setdefault(block, torch.zeros(BLOCK, dtype=dtype))
                into[start:end] = rest[at : at + size].clone().view(dtype)
                at += size
        if shared:
            numbers += block_squares(torch.cat(list(shared.values()))).tolist()
        return global_norm(numbers), asked


class NormOverParts:
    """Tensors are cut: each element is counted once, in float64, in an order that the cut decides."""

    def __init__(
        self,
        group: Group,
        sets: Sequence[Gradients],
        counted: Sequence[Sequence[bool]],
        ranks: Sequence[int],
        account: SplitAccount,
    ) -> None:
        """``group``: all workers. ``counted``: of each set's parameters, those that this worker's place in the replica
        counts; ``ranks``: this worker's among those that sum the set."""
        self._group, self._account = group, account
        self._pieces = [
            (gradients, piece)
            for gradients, counts, rank in zip(sets, counted, ranks, strict=True)
            for piece in pieces_of(gradients.layout, [rank])
            if counts[piece.slot]
        ]

    def __call__(self, squares: Sequence[Tensor], asked: int) -> tuple[float, int]:
        own = [float(_read(gradients, piece).to(torch.float64).square().sum()) for gradients, piece in self._pieces]
        numbers: list[float] = []
        for row in _all_rows(self._group, self._account, asked, np.array(own, dtype=np.float64)):
            asked |= row.asked
            numbers += row.squares
        return global_norm(numbers), asked


@dataclass(frozen=True)
class _Row:
    asked: int
    squares: list[float]
    rest: bytes


def _all_rows(
    group: Group, account: SplitAccount, asked: int, own: np.ndarray, values: Sequence[np.ndarray] = ()
) -> list[_Row]:
    """All workers' rows; what they have counted goes along."""
    counted = account.row()
    head = _HEAD.pack(asked, len(own), len(counted))
    rows, accounts = [], []
    for row in group.gather(b"".join([head, own.tobytes(), counted, *(value.tobytes() for value in values)])):
        also, count, length = _HEAD.unpack_from(row)
        at = _HEAD.size + 8 * count
        rows.append(_Row(also, np.frombuffer(row, np.float64, count, _HEAD.size).tolist(), row[at + length :]))
        accounts.append(row[at : at + length])
    account.heard(accounts)
    return rows


def _read(gradients: Gradients, piece: Piece) -> Tensor:
    """The mean gradient of a piece that this worker has finished, flat."""
    exchange = gradients.exchange
    if exchange.sliced_result:
        found: Tensor = exchange.piece(piece)  # type: ignore[attr-defined]
        return found
    return exchange.result_of(piece.slot)[piece.start : piece.stop]


def _in_blocks(piece: Piece) -> list[Piece]:
    """Cut where blocks begin."""
    found, place, end = [], piece.place, piece.place + piece.length
    while place < end:
        stop = min(end, (place // BLOCK + 1) * BLOCK)
        begin = piece.start + place - piece.place
        found.append(Piece(piece.slot, begin, begin + stop - place, place))
        place = stop
    return found
