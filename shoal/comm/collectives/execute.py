"""Carries out a program on tensors, over any transport.

Half precision: sums of float16 and bfloat16 are made in float32 and rounded once, when all operands are in. Where ranks
add what others have added (rings, trees), what they pass on travels in float32 meanwhile, twice the bytes of a finished
value; where one rank adds all operands of a slice (direct, two_shot, canonical), nothing travels wider than it must.
``rounding="hop"`` passes on rounded sums instead: fewer bytes, an error that grows with the number of hops.

Memory: an operand is only overwritten where the tensor is operand and result in one. Sums that leave again are made in
the buffer in which a message came; buffers are used again. What comes goes where it belongs without a copy, unless the
chunks of one message do not lie side by side.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from shoal.comm.collectives.actions import Add, Program, block_sizes
from shoal.comm.collectives.memory import Memory, Piece, joined, lay
from shoal.comm.collectives.schedule import LEFT, OVERWRITE, Step, Transfer, schedule, spans
from shoal.comm.layout import ALIGNMENT
from shoal.comm.transports.contract import Message, Steps, Transport
from shoal.errors import UserError, unknown_name

Op = Literal["sum", "avg", "max", "min", "prod"]
Rounding = Literal["once", "hop"]
HALVES = (torch.float16, torch.bfloat16)
_Combine = Callable[..., Tensor]
_COMBINE: dict[str, _Combine] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "prod": torch.mul,
}
_ROUNDING = ("once", "hop")


def carry_out(
    transport: Transport,
    program: Program,
    operand: Tensor | None,
    result: Tensor | None,
    *,
    op: str = "sum",
    sizes: Sequence[int] | None = None,
    rounding: str = "once",
) -> Steps[None]:
    """This rank's part of ``program``, to be driven over ``transport``.

    ``operand`` and ``result`` are flat: the chunks that the rank starts with and those that it ends with, one after the
    other; None where there are none. They may be the same tensor, which is then changed in place. ``sizes`` are the
    elements of each block; by default all are alike. Raises UserError for tensors that do not fit."""
    tensor = operand if operand is not None else result
    if transport.size != program.ranks:
        raise UserError(f"{program.name}: made for {program.ranks} ranks, but the group has {transport.size}.")
    if transport.lanes < program.lanes:
        raise UserError(f"{program.name}: needs {program.lanes} lanes, but the transport has {transport.lanes}.")
    if op not in _COMBINE:
        raise unknown_name("operation", op, _COMBINE, program.name)
    if rounding not in _ROUNDING:
        raise unknown_name("rounding", rounding, _ROUNDING, program.name)
    if tensor is None and sizes is None:
        raise UserError(f"{program.name}: rank {transport.rank} has no tensor, so it must be told the sizes.")
    dtype = tensor.dtype if tensor is not None else torch.uint8
    _check_op(program, op, dtype)
    yield from _Execution(transport, program, operand, result, op, sizes, rounding == "once").steps()


def _check_op(program: Program, op: str, dtype: torch.dtype) -> None:
    if op == "avg" and not (dtype.is_floating_point or dtype.is_complex):
        raise UserError(f"{program.name}: no average of {_name(dtype)}: use op='sum' and divide as you see fit.")
    if op in ("max", "min") and dtype.is_complex:
        raise UserError(f"{program.name}: {_name(dtype)} has no order, so no {op}.")
    if dtype.itemsize == 1 and dtype.is_floating_point:
        raise UserError(f"{program.name}: {_name(dtype)} cannot be added: convert it first, to bfloat16 for example.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Execution:
    def __init__(
        self,
        transport: Transport,
        program: Program,
        operand: Tensor | None,
        result: Tensor | None,
        op: str,
        sizes: Sequence[int] | None,
        once: bool,
    ) -> None:
        self.transport, self.program = transport, program
        rank = transport.rank
        if sizes is None:
            sizes = _sizes(program, rank, operand, result)
        self.spans = spans(program, tuple(sizes), ALIGNMENT)
        tensor = operand if operand is not None else result
        dtype = torch.uint8 if tensor is None else tensor.dtype
        device = torch.device("cpu") if tensor is None else tensor.device
        self.operand_pieces = lay(operand, program.starts[rank], self.spans, f"{program.name}: the operand")
        home = lay(result, program.ends[rank], self.spans, f"{program.name}: the result")
        self.memory = Memory(self.operand_pieces, home, dtype, device)
        self.combine = _COMBINE[op]
        self.average = op == "avg"
        self.wide = torch.float32 if once and dtype in HALVES and op not in ("max", "min") else None
        self.reduced = self.copied = 0

    def size(self, chunk: int) -> int:
        start, stop = self.spans[self.program.like(chunk)]
        return stop - start

    def steps(self) -> Steps[None]:
        memory, rank = self.memory, self.transport.rank
        for step in schedule(self.program)[rank]:
            sends, temporary = self._sends(step)
            receives, arrived = self._receives(step)
            if self.copied:
                self._worked()
            if sends or receives:
                yield self.transport.post(sends, receives)
            for piece in temporary:
                memory.drop(piece)
            self._take_in(step, arrived)
            for place, first, stop in step.additions:
                came = arrived[place]
                if came is not None:
                    self._add_arrived(step.receives[place], came, first, stop)
            for used in arrived:
                if used is not None:
                    memory.drop(used)
            for action in step.local:
                if not self.size(action.into):
                    continue
                if isinstance(action, Add):
                    other = memory.held[action.other]
                    self._combine([action.into], [other], incoming_first=action.other_first, keep=True)
                else:
                    self._copy(action.other, action.into)
            self._finish(step.finished)
            for chunk in step.free:
                memory.forget(chunk)
            if self.reduced or self.copied:
                self._worked()
        self._settle()

    def _worked(self) -> None:
        self.transport.worked(self.reduced, self.copied)
        self.reduced = self.copied = 0

    def _kind(self, transfer: Transfer) -> torch.dtype:
        return self.wide if self.wide is not None and transfer.wide else self.memory.dtype

    def _sends(self, step: Step) -> tuple[list[Message], list[Piece]]:
        messages, temporary = [], []
        for transfer in step.sends:
            pieces = [self.memory.held[chunk] for chunk in transfer.chunks if self.size(chunk)]
            if not pieces:
                continue
            whole = joined(pieces)
            if whole is None:
                whole = self.memory.take(sum(piece.size for piece in pieces), self._kind(transfer))
                torch.cat([piece.view for piece in pieces], out=whole.buffer)
                self.copied += _bytes(whole)
                temporary.append(whole)
            messages.append(Message(transfer.peer, whole.view, transfer.lane))
        return messages, temporary

    def _receives(self, step: Step) -> tuple[list[Message], list[Piece | None]]:
        """The messages to receive, and for each the temporary piece it comes into; None: it comes where it belongs."""
        messages: list[Message] = []
        arrived: list[Piece | None] = []
        for transfer in step.receives:
            total = sum(map(self.size, transfer.chunks))
            into = self._place(transfer) if total else None
            piece = None
            if total and into is None:
                into = piece = self.memory.take(total, self._kind(transfer))
            arrived.append(piece)
            if into is not None:
                messages.append(Message(transfer.peer, into.view, transfer.lane))
        return messages, arrived

    def _place(self, transfer: Transfer) -> Piece | None:
        """Where a message that only overwrites may go without a copy."""
        if any(how != OVERWRITE for how in transfer.how) or self._kind(transfer) is not self.memory.dtype:
            return None
        chunks = [chunk for chunk in transfer.chunks if self.size(chunk)]
        homes = [home for chunk in chunks if (home := self.memory.home.get(chunk)) is not None]
        whole = joined(homes) if len(homes) == len(chunks) else None
        if whole is not None:
            for chunk, home in zip(chunks, homes, strict=True):
                self.memory.put(chunk, home)
        return whole

    def _take_in(self, step: Step, arrived: list[Piece | None]) -> None:
        """Put what overwrites chunks where it belongs; what has no home stays where it came."""
        memory = self.memory
        for transfer, piece in zip(step.receives, arrived, strict=True):
            if piece is None:
                continue
            at = 0
            moves: list[tuple[Piece, Piece]] = []
            for chunk, how in zip(transfer.chunks, transfer.how, strict=True):
                part = piece.part(at, at + self.size(chunk))
                at += part.size
                if how == OVERWRITE:
                    home = memory.home.get(chunk)
                    if home is not None and piece.buffer.dtype is home.buffer.dtype:
                        moves.append((home, part))
                        memory.put(chunk, home)
                    else:
                        memory.put(chunk, part)
            if moves:
                self._move(moves)

    def _move(self, moves: Sequence[tuple[Piece, Piece]]) -> None:
        for into, origin in self.memory.runs(*zip(*moves, strict=True)):
            into.view.copy_(origin.view)
            self.copied += _bytes(into)

    def _add_arrived(self, transfer: Transfer, piece: Piece, first: int, stop: int) -> None:
        """Chunks first to stop of a message are added to what is there."""
        at = sum(map(self.size, transfer.chunks[:first]))
        chunks = [chunk for chunk in transfer.chunks[first:stop] if self.size(chunk)]
        parts: list[Piece] = []
        for chunk in chunks:
            parts.append(piece.part(at, at + self.size(chunk)))
            at += parts[-1].size
        if chunks:
            self._combine(chunks, parts, incoming_first=transfer.how[first] == LEFT)

    def _combine(
        self, chunks: Sequence[int], others: Sequence[Piece], *, incoming_first: bool, keep: bool = False
    ) -> None:
        """Each chunk becomes itself + other, or other + itself; ``keep``: the others must not be overwritten."""
        memory = self.memory
        held = [memory.held[chunk] for chunk in chunks]
        taken: list[Piece] = []
        out: list[Piece] = []
        for chunk, own, other in zip(chunks, held, others, strict=True):
            place = self._sum_place(chunk, own, other, keep)
            if place is None:
                place = memory.take(own.size, self.wide)
                taken.append(place)
            out.append(place)
        for own, other, into in memory.runs(held, others, out):
            left, right = (other.view, own.view) if incoming_first else (own.view, other.view)
            target = into.view
            if self.wide is not None and self.wide not in (left.dtype, right.dtype):
                left = target.copy_(left)  # two halves would be added, and rounded, as halves
            self.combine(left, right, out=target)
            self.reduced += _bytes(into)
        for chunk, into in zip(chunks, out, strict=True):
            memory.put(chunk, into)
        for piece in taken:
            memory.drop(piece)  # it is the chunk's now

    def _sum_place(self, chunk: int, own: Piece, other: Piece, keep: bool) -> Piece | None:
        """Where a sum is made without new memory."""
        memory, kind = self.memory, self.wide or self.memory.dtype
        home = memory.home.get(chunk)
        if home is not None and home.buffer.dtype is kind:
            return home
        if memory.own(own) and own.buffer.dtype is kind:
            return own
        if not keep and other.buffer.dtype is kind:
            return other
        return None

    def _copy(self, origin: int, into: int) -> None:
        memory = self.memory
        piece = memory.held[origin]
        home = memory.home.get(into)
        target = home if home is not None and home.buffer.dtype is piece.buffer.dtype else None
        if target is None:
            target = memory.take(piece.size, piece.buffer.dtype)
        target.view.copy_(piece.view)
        memory.put(into, target)
        memory.drop(target)
        self.copied += _bytes(target)

    def _finish(self, chunks: Sequence[int]) -> None:
        """These chunks have all their operands: divide for an average, round to the tensor's own type."""
        memory = self.memory
        chunks = [chunk for chunk in chunks if self.size(chunk)]
        if not chunks or (self.wide is None and not self.average):
            return
        held = [memory.held[chunk] for chunk in chunks]
        if self.average:
            for (piece,) in memory.runs(held):
                piece.view.div_(self.program.ranks)
        if self.wide is None:
            return
        places = [memory.home.get(chunk) or memory.take(piece.size) for chunk, piece in zip(chunks, held, strict=True)]
        self._move(list(zip(places, held, strict=True)))
        for chunk, place in zip(chunks, places, strict=True):
            memory.put(chunk, place)
            memory.drop(place)

    def _settle(self) -> None:
        """Results that were there from the beginning, or are somewhere else, go home."""
        moves: list[tuple[Piece, Piece]] = []
        for chunk, home in self.memory.home.items():
            if home.size:
                held = self.memory.held[chunk]
                if held.buffer is not home.buffer or held.start != home.start:
                    moves.append((home, held))
        if moves:
            self._move(moves)
            self._worked()


def _bytes(piece: Piece) -> int:
    return piece.size * piece.buffer.element_size()


def _sizes(program: Program, rank: int, operand: Tensor | None, result: Tensor | None) -> list[int]:
    """The sizes of all blocks, from a tensor of this rank, when all blocks are alike."""
    for tensor, chunks in ((operand, program.starts[rank]), (result, program.ends[rank])):
        if tensor is not None and len(chunks):
            blocks = len(chunks) // program.segments
            if tensor.numel() % blocks:
                have = f"{tensor.numel()} elements on rank {rank}"
                raise UserError(f"{program.name}: {have} do not divide into {blocks} equal blocks.")
            return [tensor.numel() // blocks] * program.blocks
    return block_sizes(program.collective, program.ranks, 0)
