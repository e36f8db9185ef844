"""The tensors of one server: its slices of the parameters, of every worker's gradient, and the optimiser's state.

All lie on a heap. On one host it is shared, so that workers write gradients where the server reads them, and read the
weights where it writes them; for servers over TCP it is the server's own. Tensors are as long as the flat buffer, and
only the own pieces are ever touched: what nobody touches takes no memory.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from shoal.comm import past_cache, sgd
from shoal.comm.finishing import finish_flat
from shoal.comm.heap import Heap
from shoal.comm.layout import BLOCK
from shoal.comm.server import optimizer as optimizers
from shoal.comm.server.cuts import Part, Piece
from shoal.comm.server.setup import Setup
from shoal.comm.tree import Add, completion, covering

CHUNK_BYTES = 4 << 20  # of weights and states that travel in messages


class Memory:
    """Where weights and gradients lie. Every process that shares the heap makes one of the same setup."""

    def __init__(self, setup: Setup, heap: Heap, *, replicas: bool) -> None:
        """``replicas``: one copy of the weights for each worker, for schemes in which they change under way."""
        layout, dtype = setup.layout, setup.flat_dtype
        self.setup = setup
        self._heap = heap
        width = dtype.itemsize
        self.weights = heap.tensor(layout.elements * width, torch.uint8)
        self.squares = heap.tensor(layout.elements // BLOCK, torch.float64)
        self.operands = [[heap.tensor(layout.elements, dtype) for _ in range(n)] for n in setup.partials]
        count = setup.expected if replicas else 0
        self.replicas = [heap.tensor(layout.elements * width, torch.uint8) for _ in range(count)]

    def grow(self) -> list[Tensor]:
        """Room for the gradient of a worker that was not expected."""
        return [self._heap.tensor(self.setup.layout.elements, self.setup.flat_dtype)]

    def parameter(self, slot: int, memory: Tensor) -> Tensor:
        """The whole parameter in ``memory`` (weights or a replica), in its own shape and dtype."""
        return self.part(Part(slot, 0, self.setup.gradients[slot]), memory).view(self.setup.shapes[slot])

    def part(self, part: Part, memory: Tensor) -> Tensor:
        """A run of a parameter, flat. Each parameter lies packed from its slot's first byte on."""
        dtype: torch.dtype = getattr(torch, self.setup.dtypes[part.slot])
        begin = self.setup.layout.slots[part.slot].offset * self.setup.flat_dtype.itemsize
        run = memory[begin + part.start * dtype.itemsize : begin + part.stop * dtype.itemsize]
        return run.view(dtype)


@dataclass(frozen=True)
class Chunk:
    """A part of one tensor, or one plain value, of the optimiser's state."""

    slot: int
    start: int  # elements of the parameter: which part it belongs to
    key: str
    value: Any  # plain; None: a tensor
    shape: tuple[int, ...] = ()
    dtype: str = "none"
    offset: int = 0  # bytes
    data: Any = b""


class Store:
    """``memory`` and what one server does to its pieces of it."""

    def __init__(self, setup: Setup, server: int, memory: Memory) -> None:
        """Raises UserError when the optimiser cannot be made."""
        self.setup, self.memory = setup, memory
        self.pieces = setup.pieces[server]
        self.parts = setup.parts(server)
        self.by_bucket: dict[int, list[Piece]] = {}
        for piece in self.pieces:
            self.by_bucket.setdefault(piece.bucket, []).append(piece)
        self.extra: dict[int, list[Tensor]] = {}  # gradients of workers that were not expected
        self._parameters = [torch.nn.Parameter(self._shaped(p, memory.part(p, memory.weights))) for p in self.parts]
        group_of = {slot: index for index, own in enumerate(setup.members) for slot in own}
        members: list[list[torch.nn.Parameter]] = [[] for _ in setup.groups]
        for part, parameter in zip(self.parts, self._parameters, strict=True):
            if part.slot in group_of:
                members[group_of[part.slot]].append(parameter)
        self._kept_groups = [index for index, own in enumerate(members) if own]
        self.optimizer = optimizers.build(setup.optimizer, setup.defaults, setup.groups, members)
        self._gradients: dict[int, list[Tensor]] = {}  # address of a flat gradient -> its views
        self._replicas: dict[int, dict[Tensor, Tensor]] = {}  # address of a replica -> parameter -> its run of it
        self._copier = past_cache.copier(sum(bytes_of(setup, part) for part in self.parts))
        self._arriving: dict[tuple[int, int, str], Tensor] = {}

    def _shaped(self, part: Part, flat: Tensor) -> Tensor:
        """A whole parameter has its own shape, for optimisers that look at it."""
        whole = part.start == 0 and part.stop == self.setup.gradients[part.slot]
        return flat.view(self.setup.shapes[part.slot]) if whole else flat

    def operands(self, worker: int) -> list[Tensor]:
        if worker < len(self.memory.operands):
            return self.memory.operands[worker]
        if worker not in self.extra:
            self.extra[worker] = self.memory.grow()
        return self.extra[worker]

    # --- gradients --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sum(self, bucket: int, operands: Sequence[Tensor], adds: Sequence[Add], by: tuple[float, float]) -> None:
        """Finish the tree over the own pieces of a bucket, in operand 0, and divide, in one pass over memory."""
        start_of_state = self.setup.layout.state_start
        for piece in self.by_bucket.get(bucket, ()):
            divisor = by[0] if piece.start < start_of_state else by[1]
            for start, stop in runs_of(piece):
                squares = None
                if (stop - start) % BLOCK == 0 and start % BLOCK == 0 and start < start_of_state:
                    squares = self.memory.squares[start // BLOCK : stop // BLOCK]
                finish_flat([operand[start:stop] for operand in operands], adds, divisor, squares)

    def squares(self) -> tuple[list[int], list[float]]:
        """(which blocks of the norm this server holds whole, their sums of squares)."""
        start_of_state = self.setup.layout.state_start
        held = [
            start // BLOCK
            for piece in self.pieces
            for start, stop in blocks(piece)
            if stop - start == BLOCK and start < start_of_state
        ]
        return held, self.memory.squares[held].tolist()

    @torch.no_grad()
    def fragments(self, flat: Tensor) -> Tensor:
        """What a worker needs of the finished sum: cut blocks of the norm, and the buffers' changes. uint8."""
        runs = [flat[start:stop].view(torch.uint8) for start, stop in fragment_runs(self.setup, self.pieces)]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def scale(self, flat: Tensor, factor: float) -> None:
        for piece in self.pieces:
            if piece.start < self.setup.layout.state_start:
                flat[piece.start : piece.stop].mul_(factor)

    def apply(
        self,
        flat: Tensor,
        groups: Sequence[Mapping[str, Any]],
        share: float,
        unused: Sequence[int],
        into: Tensor | None = None,
    ) -> None:
        """One step of the optimiser with the gradient ``flat``.

        ``groups``: the options of now. ``share``: of the learning rate, for a push that is a part of a batch.
        Parameters in ``unused`` have no gradient. ``into``: a replica, which gets the new weights."""
        if self.optimizer is None:
            if into is not None:
                self.copy_weights(into)
            return
        for group, index in zip(self.optimizer.param_groups, self._kept_groups, strict=True):
            group.update({key: optimizers.restored(value) for key, value in groups[index].items()})
            if share != 1.0:
                group["lr"] = group["lr"] * share
        views = self._gradients.get(flat.data_ptr())
        if views is None:
            views = self._gradients[flat.data_ptr()] = [self._gradient(part, flat) for part in self.parts]
        left_out = set(unused)
        for part, parameter, view in zip(self.parts, self._parameters, views, strict=True):
            parameter.grad = None if part.slot in left_out else view.to(parameter.dtype)
        if sgd.usable(self.optimizer):
            copies = self._replica(into) if into is not None else {}
            sgd.step(self.optimizer, copies)
            self._copy([parameter for parameter in copies if parameter.grad is None], copies)
        else:
            self.optimizer.step()
            if into is not None:
                self.copy_weights(into)
        for parameter in self._parameters:
            parameter.grad = None

    def _gradient(self, part: Part, flat: Tensor) -> Tensor:
        offset = self.setup.layout.slots[part.slot].offset
        return self._shaped(part, flat[offset + part.start : offset + part.stop])

    # --- weights ----------------------------------------------------------------------------------------------

    def copy_weights(self, into: Tensor) -> None:
        """Copy the own parts into a worker's replica."""
        copies = self._replica(into)
        self._copy(list(copies), copies)

    @torch.no_grad()
    def _copy(self, parameters: Sequence[Tensor], copies: Mapping[Tensor, Tensor]) -> None:
        for parameter in parameters:
            self._copier(copies[parameter], parameter.detach())

    def _replica(self, memory: Tensor) -> dict[Tensor, Tensor]:
        """Where each of the own parameters lies in a worker's replica."""
        address = memory.data_ptr()
        if address not in self._replicas:
            runs = [self._shaped(part, self.memory.part(part, memory)) for part in self.parts]
            self._replicas[address] = dict(zip(self._parameters, runs, strict=True))
        return self._replicas[address]

    def weights_bytes(self, first: int, stop: int) -> Tensor:
        runs = [self.memory.part(part, self.memory.weights).view(torch.uint8) for part in self.parts[first:stop]]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def weights_size(self, first: int, stop: int) -> int:
        return sum(bytes_of(self.setup, part) for part in self.parts[first:stop])

    @torch.no_grad()
    def unpack_weights(self, first: int, stop: int, data: Tensor) -> None:
        start = 0
        for part in self.parts[first:stop]:
            run = self.memory.part(part, self.memory.weights).view(torch.uint8)
            run.copy_(data[start : start + run.numel()])
            start += run.numel()

    # --- the optimiser's state --------------------------------------------------------------------------------

    def held(self) -> Iterator[tuple[Part, Tensor, Mapping[str, Any]]]:
        """Each part, where it lies, and what the optimiser holds of it."""
        for part, parameter in zip(self.parts, self._parameters, strict=True):
            yield part, parameter.detach(), self.optimizer.state.get(parameter, {}) if self.optimizer else {}

    def state(self) -> Iterator[Chunk]:
        """All that the optimiser holds, in pieces."""
        if self.optimizer is None:
            return
        for part, parameter in zip(self.parts, self._parameters, strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    yield Chunk(part.slot, part.start, key, optimizers.plain(value))
                    continue
                yield from chunks(part.slot, part.start, key, value)

    def take_state(self, chunk: Chunk) -> None:
        """The inverse of `state`. Raises KeyError for a part that is not held, ValueError for a wrong size."""
        index = next(i for i, p in enumerate(self.parts) if (p.slot, p.start) == (chunk.slot, chunk.start))
        assert self.optimizer is not None
        state = self.optimizer.state[self._parameters[index]]
        if chunk.value is not None:
            state[chunk.key] = optimizers.restored(chunk.value)
            return
        whole = state.get(chunk.key)
        if chunk.offset == 0:
            whole = state[chunk.key] = torch.zeros(chunk.shape, dtype=getattr(torch, chunk.dtype))
        into = whole.view(-1).view(torch.uint8)[chunk.offset : chunk.offset + len(chunk.data)]
        if len(into) != len(chunk.data):
            raise ValueError("a piece of a state that lies beyond its end")
        if len(into):
            into.copy_(chunk.data)

    def forget_state(self) -> None:
        if self.optimizer is not None:
            self.optimizer.state.clear()


def runs_of(piece: Piece) -> Iterator[tuple[int, int]]:
    """A piece as runs that are whole blocks of the norm, or a part of one."""
    first, last = -(-piece.start // BLOCK) * BLOCK, piece.stop // BLOCK * BLOCK
    edges = [piece.start, first, last, piece.stop] if first <= last else [piece.start, piece.stop]
    return ((a, b) for a, b in pairwise(edges) if a < b)


def blocks(piece: Piece) -> Iterator[tuple[int, int]]:
    """A piece cut at the edges of the norm's blocks."""
    edges = [piece.start, *range((piece.start // BLOCK + 1) * BLOCK, piece.stop, BLOCK), piece.stop]
    return iter(pairwise(edges))


def fragment_runs(setup: Setup, held: Sequence[Piece]) -> list[tuple[int, int]]:
    """The runs of a server that make no whole block of the norm, and those of the buffers."""
    state = setup.layout.state_start
    return [(a, b) for piece in held for a, b in blocks(piece) if b - a < BLOCK or a >= state]


def weight_runs(setup: Setup, held: Sequence[Part]) -> list[tuple[int, int]]:
    """Runs ``first .. stop - 1`` of parts that travel as one message of about 4 MiB; first-needed runs first."""
    runs: list[tuple[int, int]] = []
    stop, size = len(held), 0
    for index in range(len(held) - 1, -1, -1):
        bytes_ = bytes_of(setup, held[index])
        if size and size + bytes_ > CHUNK_BYTES:
            runs.append((index + 1, stop))
            stop, size = index + 1, 0
        size += bytes_
    if stop:
        runs.append((0, stop))
    return runs


def bytes_of(setup: Setup, part: Part) -> int:
    dtype: torch.dtype = getattr(torch, setup.dtypes[part.slot])
    return (part.stop - part.start) * dtype.itemsize


def chunks(slot: int, start: int, key: str, tensor: Tensor) -> Iterator[Chunk]:
    """A tensor of a state in pieces of 4 MiB; one empty piece for an empty one."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    dtype = str(tensor.dtype).removeprefix("torch.")
    for offset in range(0, max(1, raw.numel()), CHUNK_BYTES):
        yield Chunk(slot, start, key, None, tuple(tensor.shape), dtype, offset, raw[offset : offset + CHUNK_BYTES])


def round_adds(setup: Setup, members: Sequence[int], passes: Sequence[int]) -> tuple[list[int], list[Add]]:
    """(partial sums of each member, the additions over all of them), in the canonical tree.

    With an ownership the leaves are the shards of the run; without one each member is a leaf, in order."""
    if not setup.ownership:
        return [1] * len(members), completion([range(i, i + 1) for i in range(len(members))], [1] * len(members))
    owned = [range(*setup.ownership[worker]) for worker in members]
    here = {leaf for own in owned for leaf in own}
    present = [count if leaf in here else 0 for leaf, count in enumerate(passes)]
    counts = [sum(any(present[n.start : n.stop]) for n in covering(own, len(present))) for own in owned]
    return counts, completion(owned, present)


def denominators(setup: Setup, counts: Sequence[Sequence[float]], passes: Sequence[int]) -> tuple[float, float]:
    """(of gradients, of buffers), from each member's targets by leaf; summed just as the workers sum them."""
    width = setup.facts or setup.leaves
    rows = torch.zeros(len(counts), width, dtype=torch.float64)
    rows[:, width - setup.leaves :] = torch.tensor(counts, dtype=torch.float64).view(len(counts), -1)
    total = max(float(rows[:, width - setup.leaves :].sum()), 1.0) if setup.ownership else float(rows.sum())
    if not math.isfinite(total) or total <= 0:
        raise ValueError(f"a count of {total}")
    return total, float(max(1, sum(1 for p in passes if p)))
