"""Collectives as one calls them: tensors of any shape, cut and joined along any dim, each call counted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from shoal.comm.accounting.counters import Kind
from shoal.comm.group import Group
from shoal.comm.tensors.carrier import Carrier, told
from shoal.errors import UserError

Like = Tensor | tuple[Sequence[int], torch.dtype]
_MOST_DIMS = 16


class Collectives:
    """Called by all workers of a group, in the same order; they return when the result can be read.

    Sums are taken in the order of the ranks, so that all have the same bits; 16-bit floats are added in float32 and
    rounded once. Results are contiguous and have no history; what comes in is never written. With one worker nothing is
    copied: what comes in is handed back.
    Raises OutOfStep, on all workers, when they ask for different things, and PeerLost."""

    def __init__(self, group: Group, carrier: Carrier | None) -> None:
        """``carrier`` is None for one worker."""
        self.rank, self.world = group.rank, group.world
        self._counters, self._carrier = group.counters, carrier

    def all_reduce(self, t: Tensor) -> Tensor:
        """The sum over all workers. Sends 2(n-1)/n of its bytes."""
        if self._carrier is None:
            return t
        source = _plain(t)
        out = torch.empty_like(source)
        moved = round(2 * (self.world - 1) / self.world * source.nbytes)
        with self._counted("all-reduce", moved, moved):
            self._carrier.all_reduce(source, out, f"all_reduce {told(t)}")
        return out

    def all_gather(self, t: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """All workers' tensors, joined along ``dim`` in the order of the ranks.

        ``sizes[r]`` is rank r's size there; None: all have this one's. Sends (n-1)/n of the result's bytes."""
        if self._carrier is None:
            return t
        dim = _dim(t, dim, "all_gather")
        sizes = [t.shape[dim]] * self.world if sizes is None else list(sizes)
        if len(sizes) != self.world or sizes[self.rank] != t.shape[dim]:
            raise UserError(
                f"all_gather: sizes {sizes} of dim {dim} are not those of {self.world} ranks of which rank {self.rank} "
                f"has {t.shape[dim]}."
            )
        source, rest = _plain(t), _without(t, dim)
        whole = source.new_empty((*t.shape[:dim], sum(sizes), *t.shape[dim + 1 :])) if dim == 0 else None
        outs = (
            list(torch.split(whole, sizes))
            if whole is not None
            else [source.new_empty((*t.shape[:dim], size, *t.shape[dim + 1 :])) for size in sizes]
        )
        signature = f"all_gather {str(t.dtype)[6:]} {rest} along dim {dim}, sizes {sizes}"
        others = sum(out.nbytes for out in outs) - source.nbytes
        with self._counted("all-gather", source.nbytes * (self.world - 1), others):
            self._carrier.all_gather(source, outs, signature)
        return torch.cat(outs, dim) if whole is None else whole

    def reduce_scatter(self, t: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """Rank r's part of the sum over all workers, cut along ``dim`` into ``sizes``; None: into equal parts.

        Sends (n-1)/n of the tensor's bytes."""
        if self._carrier is None:
            return t
        dim = _dim(t, dim, "reduce_scatter")
        if sizes is None and t.shape[dim] % self.world:
            raise UserError(
                f"reduce_scatter: dim {dim} of {told(t)} is not a multiple of the {self.world} ranks: name sizes."
            )
        sizes = [t.shape[dim] // self.world] * self.world if sizes is None else list(sizes)
        if len(sizes) != self.world or sum(sizes) != t.shape[dim]:
            raise UserError(f"reduce_scatter: sizes {sizes} do not cut dim {dim} of {told(t)} for {self.world} ranks.")
        sources = [part.contiguous() for part in torch.split(t.detach(), sizes, dim)]
        mine = sources[self.rank]
        out = torch.empty_like(mine)
        others = sum(source.nbytes for source in sources) - mine.nbytes
        with self._counted("reduce-scatter", others, mine.nbytes * (self.world - 1)):
            self._carrier.reduce_scatter(sources, out, f"reduce_scatter {told(t)} along dim {dim}, sizes {sizes}")
        return out

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """``parts[r]`` goes to rank r; what each rank has for this one. Shapes may differ, the type must not."""
        if self._carrier is None:
            return list(parts)
        if len(parts) != self.world or len({part.dtype for part in parts}) > 1:
            what = ", ".join(map(told, parts))
            raise UserError(f"all_to_all: one part of one type for each of {self.world} ranks is needed, got {what}.")
        sources = [_plain(part) for part in parts]
        table = torch.zeros(self.world, self.world, 1 + _MOST_DIMS, dtype=torch.int64)
        for row, source in zip(table[self.rank], sources, strict=True):
            row[: 1 + source.dim()] = torch.tensor([source.dim(), *source.shape])
        kind = str(parts[0].dtype)[6:]
        self._carrier.all_gather(table[self.rank].clone(), list(table), f"all_to_all {kind}")
        shapes = [[row[1 : 1 + row[0]] for row in rows] for rows in table.tolist()]  # [from][to]
        outs = [sources[0].new_empty(row[self.rank]) for row in shapes]
        sent, received = (sum(t.nbytes for r, t in enumerate(ts) if r != self.rank) for ts in (sources, outs))
        with self._counted("all-to-all", sent, received):
            counts = [[prod(shape) for shape in row] for row in shapes]
            self._carrier.all_to_all(sources, outs, counts, f"all_to_all {kind}")
        return outs

    def broadcast(self, t: Tensor, root: int) -> Tensor:
        """The root's tensor; that of the others gives its shape and type alone."""
        if not 0 <= root < self.world:
            raise UserError(f"broadcast: there is no rank {root} among {self.world}.")
        if self._carrier is None:
            return t
        sends = root == self.rank
        data = _plain(t) if sends else torch.empty_like(t.detach(), memory_format=torch.contiguous_format)
        sent, received = (data.nbytes * (self.world - 1), 0) if sends else (0, data.nbytes)
        with self._counted("broadcast", sent, received):
            self._carrier.broadcast(data, root, f"broadcast {told(t)}, root {root}")
        return t.detach() if sends else data

    def send(self, t: Tensor, to: int) -> None:
        """To one other rank, which receives in the same order. May return before that one has begun to.

        A worker that leaves before it has been received may take it along: end with a barrier."""
        source, carrier = _plain(t), self._peer(to, "send")
        with self._counted("send", source.nbytes, 0):
            carrier.send(source, to)

    def recv(self, like: Like, origin: int) -> Tensor:
        """What rank ``origin`` sends; ``like`` gives its shape and type. Raises OutOfStep when they are others."""
        carrier = self._peer(origin, "recv")
        if isinstance(like, Tensor):
            out = torch.empty_like(like.detach(), memory_format=torch.contiguous_format)
        else:
            out = torch.empty(tuple(like[0]), dtype=like[1])
        with self._counted("receive", 0, out.nbytes):
            carrier.receive(out, origin)
        return out

    def barrier(self) -> None:
        """Returns when all workers have come to it."""
        if self._carrier is not None:
            with self._counted("barrier", 0, 0):
                self._carrier.barrier()

    def _peer(self, rank: int, what: str) -> Carrier:
        if self._carrier is None or rank == self.rank or not 0 <= rank < self.world:
            raise UserError(f"{what}: rank {rank} is no other rank of {self.world}; this is rank {self.rank}.")
        return self._carrier

    @contextmanager
    def _counted(self, operation: str, sent: int, received: int) -> Iterator[None]:
        assert self._carrier is not None
        tally = self._counters.tally(operation, self._carrier.link)
        begun = self._counters.clock()
        yield
        seconds = self._counters.clock() - begun
        for rank, stood in self._carrier.stood:
            tally.wait(rank, stood)
            seconds -= stood
        self._carrier.stood.clear()
        tally.call(sent=sent, received=received)
        tally.spend(Kind.transferring, seconds, exposed=True)


def _plain(t: Tensor) -> Tensor:
    """Its values in a row, without a history; a copy only where they do not lie so."""
    return t.detach().contiguous()


def _without(t: Tensor, dim: int) -> list[int]:
    return [size for index, size in enumerate(t.shape) if index != dim]


def _dim(t: Tensor, dim: int, what: str) -> int:
    if not -t.dim() <= dim < t.dim():
        raise UserError(f"{what}: {told(t)} has no dim {dim}.")
    return dim % t.dim()
