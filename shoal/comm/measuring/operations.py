"""One collective on one rank: its tensors, the call, and whether what came of it is right."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.torch_all_gather import all_gather

# Renamed in torch 2.13, where the old names warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

PERIOD = 4093  # of the test patterns: prime, so that a block at the wrong place is not equal by chance
DIGITS = 4  # patterns are 0 to 3: their sums are exact in every dtype, for as many ranks as cases.MOST_WORKERS
IN_PLACE = ("all_reduce", "reduce", "broadcast", "send_recv", "barrier")
Empty = Callable[[int], Tensor]  # how many elements -> a tensor of the cell's dtype


@dataclass(frozen=True)
class Tensors:
    """``input`` and ``output`` are the same tensor where the operation works in place."""

    op: str
    rank: int
    world: int
    input: Tensor
    output: Tensor

    @property
    def block(self) -> int:
        """Elements of a rank's block."""
        return max(len(self.input), len(self.output)) // self.world

    def fill(self) -> None:
        """Every rank's input is a pattern of its own; the output holds what no result does."""
        self.output.fill_(DIGITS + 1)
        offset = self.rank * self.block if self.op in ("all_gather", "gather") else 0
        if self.op not in ("broadcast", "scatter", "send_recv") or self.rank == 0:
            tile(self.input, _digits(self.rank), offset)

    def rest(self) -> None:
        """Before many repetitions: sums of sums would grow without end, sums of zeros stay zero."""
        if self.op in ("all_reduce", "reduce"):
            self.input.zero_()

    def right(self) -> bool:
        """Whether the output is what the patterns of `fill` give."""
        if self.op == "barrier":
            return True
        output, block, at = self.output, self.block, self.rank * self.block
        if self.op == "all_reduce":
            return tiled(output, _sum(self.world), 0)
        if self.op == "reduce":
            return self.rank != 0 or tiled(output, _sum(self.world), 0)
        if self.op == "broadcast":
            return tiled(output, _digits(0), 0)
        if self.op == "send_recv":
            return self.rank != self.world - 1 or tiled(output, _digits(0), 0)
        if self.op == "reduce_scatter":
            return tiled(output, _sum(self.world), at)
        if self.op == "scatter":
            return tiled(output, _digits(0), at)
        if self.op == "gather" and self.rank != 0:
            return True
        pieces = enumerate(torch.split(output, block))
        if self.op == "all_to_all":
            return all(tiled(piece, _digits(origin), at) for origin, piece in pieces)
        return all(tiled(piece, _digits(origin), origin * block) for origin, piece in pieces)  # all_gather, gather

    def rested(self) -> bool:
        """Whether repetitions after `rest` left the zeros that they must."""
        return self.op not in ("all_reduce", "reduce") or not bool(self.output.any())


def tensors(op: str, elements: int, rank: int, world: int, empty: Empty) -> Tensors:
    """``elements`` of the full buffer. All ranks allocate the same sizes in the same order: a heap asks for it."""
    first = empty(elements)
    if op in IN_PLACE:
        return Tensors(op, rank, world, first, first)
    if op == "all_to_all":
        return Tensors(op, rank, world, first, empty(elements))
    part = empty(elements // world)
    to_all = op in ("all_gather", "gather")
    return Tensors(op, rank, world, part if to_all else first, first if to_all else part)


@cache
def _digits(rank: int) -> Tensor:
    return torch.randint(DIGITS, (PERIOD,), generator=torch.Generator().manual_seed(rank + 1))


@cache
def _sum(world: int) -> Tensor:
    return torch.stack([_digits(rank) for rank in range(world)]).sum(0)


def tile(into: Tensor, pattern: Tensor, offset: int) -> None:
    """Fill a vector with the pattern repeated; its element 0 is element ``offset`` of the repetition."""
    for start, piece, wanted in _pieces(into, pattern, offset):
        into[start : start + len(piece)] = wanted[: len(piece)]


def tiled(vector: Tensor, pattern: Tensor, offset: int) -> bool:
    return all(torch.equal(piece, wanted[: len(piece)]) for _, piece, wanted in _pieces(vector, pattern, offset))


def _pieces(vector: Tensor, pattern: Tensor, offset: int) -> list[tuple[int, Tensor, Tensor]]:
    often = max(1, min(256, len(vector) // PERIOD + 1))
    wanted = pattern.roll(-(offset % PERIOD)).to(vector.dtype).to(vector.device).repeat(often)
    return [(start, vector[start : start + len(wanted)], wanted) for start in range(0, len(vector), len(wanted))]


def native_call(op: str, t: Tensors, group: dist.ProcessGroup) -> Callable[[], object]:
    """The operation as a transport carries it out itself, by torch's own functions. Root: rank 0; send_recv goes from
    the first rank to the last."""
    ranks = dist.get_process_group_ranks(group)
    root = ranks[0]
    if op == "all_reduce":
        return lambda: dist.all_reduce(t.input, group=group)
    if op == "reduce":
        return lambda: dist.reduce(t.input, root, group=group)
    if op == "broadcast":
        return lambda: dist.broadcast(t.input, root, group=group)
    if op == "all_gather":
        return lambda: all_gather(t.output, t.input, group=group)
    if op == "reduce_scatter":
        return lambda: _reduce_scatter(t.output, t.input, group=group)
    if op == "all_to_all":
        return lambda: dist.all_to_all_single(t.output, t.input, group=group)
    if op == "gather":
        parts = list(torch.split(t.output, t.block)) if t.rank == 0 else None
        return lambda: dist.gather(t.input, parts, root, group=group)
    if op == "scatter":
        given = list(torch.split(t.input, t.block)) if t.rank == 0 else None
        return lambda: dist.scatter(t.output, given, root, group=group)
    if op == "send_recv":
        if t.rank == 0:
            return lambda: dist.send(t.input, ranks[-1], group=group)
        return (lambda: dist.recv(t.input, root, group=group)) if t.rank == t.world - 1 else (lambda: None)
    return lambda: dist.barrier(group=group)
