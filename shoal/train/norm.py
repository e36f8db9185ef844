"""The global norm of a gradient that lies on several workers in parts, and whether any of them was asked to stop."""

import json
import struct
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.comm.finishing import block_squares, global_norm
from shoal.comm.group import Group
from shoal.comm.layout import BLOCK
from shoal.train.gradients import Gradients

_HEAD = struct.Struct("<?I")  # asked to stop; how many sums of squares follow


class Norm(Protocol):
    reads_result: bool  # of the exchanges, beside the sums of squares

    def __call__(self, squares: Sequence[Tensor], stop: bool) -> tuple[float, bool]:
        """From each set's `Gradients.reduce`: the norm over all workers, and whether one of them must stop.

        Called by all of them, after the gradients have been reduced and before they are hung up."""


class NormAlone:
    """This worker's sets are the whole gradient."""

    reads_result = False

    def __call__(self, squares: Sequence[Tensor], stop: bool) -> tuple[float, bool]:
        return global_norm(chain.from_iterable(each.tolist() for each in squares)), stop


class NormOverStages:
    """Each worker has some parameters whole: the norm has the bits that one worker with all of them would find.

    Sums of squares of whole blocks are what it takes. A block that lies on several chunks is put together first."""

    reads_result = True

    def __init__(self, group: Group, sets: Sequence[Gradients], blocks: Sequence[Sequence[int]]) -> None:
        """``group``: all that hold a part. ``blocks``: of each set, the numbers in the whole layout."""
        self._group, self._sets = group, sets
        told = [json.loads(row) for row in group.gather(json.dumps(list(chain.from_iterable(blocks))).encode())]
        held = Counter(chain.from_iterable(told))
        self._whole = [[i for i, number in enumerate(numbers) if held[number] == 1] for numbers in blocks]
        self._pieces: list[tuple[Gradients, int, int, int]] = []  # set, slot, from, to
        places = []  # (block, from, to) of each piece in its block
        for gradients, numbers in zip(sets, blocks, strict=True):
            for index, number in enumerate(numbers):
                if held[number] == 1:
                    continue
                begin = index * BLOCK
                for slot, at in enumerate(gradients.layout.slots[: len(gradients.parameters)]):
                    start, stop = max(begin, at.offset), min(begin + BLOCK, at.offset + at.size)
                    if start < stop:
                        self._pieces.append((gradients, slot, start - at.offset, stop - at.offset))
                        places.append((number, start - begin, stop - begin))
        self._places = [json.loads(row) for row in group.gather(json.dumps(places).encode())]

    def __call__(self, squares: Sequence[Tensor], stop: bool) -> tuple[float, bool]:
        own = [each[index] for each, whole in zip(squares, self._whole, strict=True) for index in [whole]]
        flat = torch.cat(own).numpy().tobytes() if own else b""
        values = [g.exchange.result_of(slot)[start:end].cpu().numpy() for g, slot, start, end in self._pieces]
        head = _HEAD.pack(stop, len(flat) // 8)
        rows = self._group.gather(b"".join([head, flat, *(value.tobytes() for value in values)]))
        dtype = self._sets[0].dtype
        numbers: list[float] = []
        shared: dict[int, Tensor] = {}
        for row, places in zip(rows, self._places, strict=True):
            asked, count = _HEAD.unpack_from(row)
            stop |= asked
            numbers += np.frombuffer(row, np.float64, count, _HEAD.size).tolist()
            rest = torch.frombuffer(bytearray(row[_HEAD.size + 8 * count :]) or bytearray(1), dtype=torch.uint8)
            at = 0
            for block, start, end in places:
                size = (end - start) * dtype.itemsize
                into = shared.setdefault(block, torch.zeros(BLOCK, dtype=dtype))
                into[start:end] = rest[at : at + size].clone().view(dtype)
                at += size
        if shared:
            numbers += block_squares(torch.cat(list(shared.values()))).tolist()
        return global_norm(numbers), stop


class NormOverParts:
    """Tensors are cut: each element is counted once, in float64, in an order that the cut decides."""

    reads_result = True

    def __init__(self, group: Group, sets: Sequence[Gradients], counted: Sequence[Sequence[bool]]) -> None:
        """``counted``: of each set's parameters, those that this worker counts."""
        self._group, self._sets, self._counted = group, sets, counted

    def __call__(self, squares: Sequence[Tensor], stop: bool) -> tuple[float, bool]:
        own = [
            float(gradients.exchange.result_of(slot).to(torch.float64).square().sum())
            for gradients, counted in zip(self._sets, self._counted, strict=True)
            for slot, counts in enumerate(counted)
            if counts
        ]
        rows = self._group.gather(_HEAD.pack(stop, len(own)) + np.array(own, dtype=np.float64).tobytes())
        numbers: list[float] = []
        for row in rows:
            asked, count = _HEAD.unpack_from(row)
            stop |= asked
            numbers += np.frombuffer(row, np.float64, count, _HEAD.size).tolist()
        return global_norm(numbers), stop
