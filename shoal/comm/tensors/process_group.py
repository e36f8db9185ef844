"""The carrier of workers that others started: torch.distributed, by what all of its backends can do."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.agreement import compare, digest
from shoal.comm.distributed import DistributedGroup
from shoal.comm.tensors.carrier import DTYPES, Counts, Stood, add_up, bytes_of, compare_message, told
from shoal.comm.torch_all_gather import all_gather

SMALL = 64 << 10  # bytes that everybody gets from everybody, where one operation is quicker than two
PENDING, FEW = 64 << 20, 16  # bytes of older sends, and sends, that may be under way
HEADED = 256 << 10  # bytes that go along with the words, when they are foreseen: they are lost where that was wrong
REMEMBERED = 4096  # operations of which the next one is
_HEAD = 18  # numbers before a message: type, dims, sizes
_WORDS = 16  # bytes before those of a collective: its digest and number. A multiple of every element's size


class _Traded(NamedTuple):
    said: int  # digest
    to_each: tuple[int, ...]  # bytes
    from_each: tuple[int, ...]
    even: bool  # as many from each rank to each, as all know: gloo takes a third of the time for it


class ProcessGroup:
    """Moves bytes and adds up itself, in the order of the ranks: backends have other orders, and few types."""

    link = "tcp"

    def __init__(self, group: DistributedGroup) -> None:
        """Called by all workers of the group."""
        everybody = [range(group.world)]
        self._group = group.split(everybody)
        self._pairs = group.split(everybody)  # messages between two come in their own order
        self.rank, self.world = group.rank, group.world
        self.stood: Stood = []
        self._operation = 0
        self._last = 0  # what was done last, and what came next when it was done before: the same on all ranks
        self._foretold: dict[int, _Traded] = {}
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()  # under way, with what they read

    def _trade(
        self,
        signature: str,
        flat: Tensor,
        to_each: Sequence[int] = (),
        from_each: Sequence[int] = (),
        most: int = 0,
        even: bool = False,
    ) -> list[Tensor]:
        """All-to-all of bytes, once all say the same: ``flat`` is cut into ``to_each``. What comes from each.
        ``most`` is what the rank with most has to send or receive, ``even`` whether all send each as much: all must
        foresee the same.

        Words and bytes go in one operation where it came after the same one before, which all remember alike: it has
        the room that was needed then, whatever each asks for now. Else the bytes go in another one.
        Raises OutOfStep, on all ranks, unless all say the same, which determines the bytes from each rank to each."""
        self._operation += 1
        to_each, from_each = to_each or [0] * self.world, from_each or [0] * self.world
        said = digest(signature)
        foretold = self._foretold.get(self._last, _Traded(0, (0,) * self.world, (0,) * self.world, True))
        foreseen = foretold.said == said
        words = [said - (1 << 63), self._operation]
        arrived = (self._even if foretold.even else self._uneven)(words, flat, to_each if foreseen else (), foretold)
        if torch.stack([row[:_WORDS] for row in arrived]).view(torch.int64).tolist() != [words] * self.world:
            compare(
                [row.decode() for row in self._group.gather(signature.encode())], self._group.names, self._operation
            )
        if not foreseen:
            if len(self._foretold) >= REMEMBERED:
                self._foretold.clear()
            self._foretold.pop(self._last, None)
            if most <= HEADED:
                self._foretold[self._last] = _Traded(said, tuple(to_each), tuple(from_each), even or not most)
        self._last = said
        if foreseen:
            return [row[_WORDS:] for row in arrived]
        return self._swap(flat, to_each, from_each, even) if most else [flat] * self.world

    def _even(self, words: list[int], flat: Tensor, to_each: Sequence[int], foretold: _Traded) -> Sequence[Tensor]:
        """What comes from each rank, words first; ``flat``, cut into ``to_each``, goes along where it was foreseen."""
        room = foretold.to_each[0]
        if not room:
            rows = torch.tensor(words * self.world, device=flat.device)
            arrived = torch.empty_like(rows)
            dist.all_to_all_single(arrived, rows, group=self._group.pg)
            return arrived.view(torch.uint8).view(self.world, -1).unbind()
        table = torch.empty(self.world, _WORDS + room, dtype=torch.uint8, device=flat.device)
        table[:, :_WORDS] = torch.tensor(words, device=flat.device).view(torch.uint8)
        if to_each:
            table[:, _WORDS:] = flat.view(self.world, room)
        arrived = torch.empty_like(table)
        dist.all_to_all_single(arrived, table, group=self._group.pg)
        return arrived.unbind()

    def _uneven(self, words: list[int], flat: Tensor, to_each: Sequence[int], foretold: _Traded) -> Sequence[Tensor]:
        """As `_even`."""
        head = torch.tensor(words, device=flat.device).view(torch.uint8)
        rooms = torch.split(flat, list(to_each)) if to_each else [head.new_zeros(room) for room in foretold.to_each]
        return self._swap(
            torch.cat([piece for room in rooms for piece in (head, room)]),
            [_WORDS + room for room in foretold.to_each],
            [_WORDS + room for room in foretold.from_each],
            False,
        )

    def _swap(self, flat: Tensor, to_each: Sequence[int], from_each: Sequence[int], even: bool) -> list[Tensor]:
        arrived = flat.new_empty(sum(from_each))
        received, sent = (None, None) if even else (list(from_each), list(to_each))
        dist.all_to_all_single(arrived, flat, received, sent, group=self._group.pg)
        return list(torch.split(arrived, list(from_each)))

    def _gathered(self, source: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Everybody's bytes, ``sizes[r]`` of rank r: the shorter ones are padded."""
        longest = max(sizes)
        if len(source) < longest:
            source = torch.cat([source, source.new_zeros(longest - len(source))])
        rows = source.new_empty(self.world * longest)
        all_gather(rows, source, group=self._group.pg)
        return [row[:size] for row, size in zip(torch.split(rows, longest), sizes, strict=True)]

    def all_reduce(self, source: Tensor, out: Tensor, signature: str) -> None:
        with self._group.explained("an all-reduce"):
            flat = bytes_of(source)
            if source.nbytes <= SMALL:
                each = [source.nbytes] * self.world
                rows = self._trade(signature, flat.repeat(self.world), each, each, sum(each), even=True)
                add_up([row.view(out.dtype) for row in rows], out.view(-1))
                return
            share = -(-source.numel() // self.world)
            counts = [max(0, min(share, source.numel() - rank * share)) for rank in range(self.world)]
            sizes = [count * source.itemsize for count in counts]
            mine = out.new_empty(counts[self.rank])
            self._reduce_scatter(flat, sizes, mine, signature)
            rows = self._gathered(bytes_of(mine), sizes)
            torch.cat(rows, out=bytes_of(out))

    def _reduce_scatter(self, flat: Tensor, sizes: list[int], out: Tensor, signature: str) -> None:
        even = len(set(sizes)) == 1
        parts = self._trade(signature, flat, sizes, [out.nbytes] * self.world, max(sizes) * self.world, even)
        add_up([part.view(out.dtype) for part in parts], out.view(-1))

    def all_gather(self, source: Tensor, outs: Sequence[Tensor], signature: str) -> None:
        with self._group.explained("an all-gather"):
            flat, sizes = bytes_of(source), [out.nbytes for out in outs]
            if max(sizes) <= SMALL:
                each = [source.nbytes] * self.world
                most, even = max(sizes) * self.world, len(set(sizes)) == 1
                rows = self._trade(signature, flat.repeat(self.world), each, sizes, most, even)
            else:
                self._trade(signature, flat[:0])
                rows = self._gathered(flat, sizes)
            for out, row in zip(outs, rows, strict=True):
                bytes_of(out).copy_(row)

    def reduce_scatter(self, sources: Sequence[Tensor], out: Tensor, signature: str) -> None:
        with self._group.explained("a reduce-scatter"):
            flat = torch.cat([bytes_of(source) for source in sources])
            self._reduce_scatter(flat, [source.nbytes for source in sources], out, signature)

    def all_to_all(self, sources: Sequence[Tensor], outs: Sequence[Tensor], counts: Counts, signature: str) -> None:
        with self._group.explained("an all-to-all"):
            flat = torch.cat([bytes_of(source) for source in sources])
            to_each, from_each = ([tensor.nbytes for tensor in tensors] for tensors in (sources, outs))
            most = max(map(sum, [*counts, *zip(*counts, strict=True)])) * outs[0].itemsize
            even = len({count for row in counts for count in row}) == 1
            arrived = self._trade(f"{signature} {counts}", flat, to_each, from_each, most, even)
            for out, row in zip(outs, arrived, strict=True):
                bytes_of(out).copy_(row)

    def broadcast(self, data: Tensor, root: int, signature: str) -> None:
        with self._group.explained("a broadcast"):
            flat = bytes_of(data)
            if data.nbytes > SMALL:
                self._trade(signature, flat[:0])
                dist.broadcast(flat, group=self._group.pg, group_src=root)
                return
            sends = self.rank == root
            to_each = [data.nbytes * sends] * self.world
            from_each = [data.nbytes * (rank == root) for rank in range(self.world)]
            copies = flat.repeat(self.world) if sends else flat[:0]
            rows = self._trade(signature, copies, to_each, from_each, data.nbytes * self.world)
            if not sends:
                flat.copy_(rows[root])

    def barrier(self) -> None:
        with self._group.explained("a barrier"):
            self._trade("barrier", torch.empty(0, dtype=torch.uint8))

    def send(self, data: Tensor, to: int) -> None:
        """Does not wait for the receiver, who may be sending too, until much is under way: gloo does not tell of what
        has arrived before it is asked."""
        with self._group.explained(f"a send to rank {self._group.names[to]}"):
            head = torch.zeros(_HEAD, dtype=torch.int64)
            head[: 2 + data.dim()] = torch.tensor([DTYPES.index(data.dtype), data.dim(), *data.shape])
            for piece in (head.to(data.device), bytes_of(data).clone()):
                if piece.nbytes:
                    work = dist.isend(piece, group=self._pairs.pg, group_dst=to)
                    assert work is not None
                    self._sends.append((work, piece))
            while len(self._sends) > FEW and sum(piece.nbytes for _, piece in self._sends) > PENDING:
                self._sends.popleft()[0].wait()

    def receive(self, out: Tensor, origin: int) -> None:
        with self._group.explained(f"a receive from rank {self._group.names[origin]}"):
            head = torch.zeros(_HEAD, dtype=torch.int64, device=out.device)
            dist.recv(head, group=self._pairs.pg, group_src=origin)
            kind, dims, *sizes = head.tolist()
            sent = told(torch.empty(sizes[:dims], dtype=DTYPES[kind], device="meta"))
            compare_message(sent, out, self._group.names[origin], self._group.names[self.rank])
            if out.nbytes:
                dist.recv(bytes_of(out), group=self._pairs.pg, group_src=origin)
