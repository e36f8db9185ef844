"""The carrier of workers that others started: torch.distributed, by what all of its backends can do."""

import hashlib
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.distributed import DistributedGroup
from shoal.comm.tensors.carrier import DTYPES, Counts, Stood, add_up, bytes_of, compare, compare_message, told
from shoal.comm.torch_all_gather import all_gather

SMALL = 64 << 10  # bytes that everybody gets from everybody, where one operation is quicker than two
PENDING, FEW = 64 << 20, 16  # bytes of older sends, and sends, that may be under way
_HEAD = 18  # numbers before a message: type, dims, sizes


class ProcessGroup:
    """Moves bytes and adds up itself, in the order of the ranks: backends have other orders, and few types."""

    link = "tcp"

    def __init__(self, group: DistributedGroup) -> None:
        """Called by all workers of the group."""
        everybody = [range(group.world)]
        self._group = group.split(everybody)
        self._pg = self._group.pg
        self._pairs = group.split(everybody).pg  # messages between two come in their own order
        self.rank, self.world = group.rank, group.world
        self.stood: Stood = []
        self._operation = 0
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()  # under way, with what they read

    def _agree(self, signature: str, device: torch.device) -> None:
        """Raises OutOfStep, on all ranks, unless all say the same."""
        self._operation += 1
        digest = hashlib.blake2b(f"{self._operation} {signature}".encode(), digest_size=8).digest()
        mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
        all_of_them = mine.new_empty(self.world)
        all_gather(all_of_them, mine, group=self._pg)
        if len(set(all_of_them.tolist())) > 1:
            said = [row.decode() for row in self._group.gather(signature.encode())]
            compare(said, self._group.names, self._operation)

    def _swap(self, flat: Tensor, to_each: list[int], from_each: list[int]) -> list[Tensor]:
        """All-to-all of bytes: ``flat`` is cut into ``to_each``. What comes from each."""
        arrived = flat.new_empty(sum(from_each))
        dist.all_to_all_single(arrived, flat, from_each, to_each, group=self._pg)
        return list(torch.split(arrived, from_each))

    def _gathered(self, source: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Everybody's bytes, ``sizes[r]`` of rank r: the shorter ones are padded."""
        longest = max(sizes)
        if len(source) < longest:
            source = torch.cat([source, source.new_zeros(longest - len(source))])
        rows = source.new_empty(self.world * longest)
        all_gather(rows, source, group=self._pg)
        return [row[:size] for row, size in zip(torch.split(rows, longest), sizes, strict=True)]

    def all_reduce(self, source: Tensor, out: Tensor, signature: str) -> None:
        with self._group.explained("an all-reduce"):
            self._agree(signature, source.device)
            if not source.nbytes:
                return
            if source.nbytes <= SMALL:
                rows = self._gathered(bytes_of(source), [source.nbytes] * self.world)
                add_up([row.view(out.dtype) for row in rows], out.view(-1))
                return
            each = -(-source.numel() // self.world)
            counts = [max(0, min(each, source.numel() - rank * each)) for rank in range(self.world)]
            sizes = [count * source.itemsize for count in counts]
            mine = out.new_empty(counts[self.rank])
            self._reduce_scatter(bytes_of(source), sizes, mine)
            rows = self._gathered(bytes_of(mine), sizes)
            torch.cat(rows, out=bytes_of(out))

    def _reduce_scatter(self, flat: Tensor, sizes: list[int], out: Tensor) -> None:
        parts = self._swap(flat, sizes, [out.nbytes] * self.world)
        add_up([part.view(out.dtype) for part in parts], out.view(-1))

    def all_gather(self, source: Tensor, outs: Sequence[Tensor], signature: str) -> None:
        with self._group.explained("an all-gather"):
            self._agree(signature, source.device)
            if any(out.nbytes for out in outs):
                for out, row in zip(outs, self._gathered(bytes_of(source), [o.nbytes for o in outs]), strict=True):
                    bytes_of(out).copy_(row)

    def reduce_scatter(self, sources: Sequence[Tensor], out: Tensor, signature: str) -> None:
        with self._group.explained("a reduce-scatter"):
            self._agree(signature, out.device)
            flat = torch.cat([bytes_of(source) for source in sources])
            self._reduce_scatter(flat, [source.nbytes for source in sources], out)

    def all_to_all(self, sources: Sequence[Tensor], outs: Sequence[Tensor], counts: Counts, signature: str) -> None:
        with self._group.explained("an all-to-all"):
            self._agree(signature, outs[0].device)
            flat = torch.cat([bytes_of(source) for source in sources])
            arrived = self._swap(flat, [s.nbytes for s in sources], [out.nbytes for out in outs])
            for out, row in zip(outs, arrived, strict=True):
                bytes_of(out).copy_(row)

    def broadcast(self, data: Tensor, root: int, signature: str) -> None:
        with self._group.explained("a broadcast"):
            self._agree(signature, data.device)
            if data.nbytes:
                dist.broadcast(bytes_of(data), group=self._pg, group_src=root)

    def barrier(self) -> None:
        with self._group.explained("a barrier"):
            self._agree("barrier", torch.device("cpu"))

    def send(self, data: Tensor, to: int) -> None:
        """Does not wait for the receiver, who may be sending too, until much is under way: gloo does not tell of what
        has arrived before it is asked."""
        with self._group.explained(f"a send to rank {self._group.names[to]}"):
            head = torch.zeros(_HEAD, dtype=torch.int64)
            head[: 2 + data.dim()] = torch.tensor([DTYPES.index(data.dtype), data.dim(), *data.shape])
            for piece in (head.to(data.device), bytes_of(data).clone()):
                if piece.nbytes:
                    work = dist.isend(piece, group=self._pairs, group_dst=to)
                    assert work is not None
                    self._sends.append((work, piece))
            while len(self._sends) > FEW and sum(piece.nbytes for _, piece in self._sends) > PENDING:
                self._sends.popleft()[0].wait()

    def receive(self, out: Tensor, origin: int) -> None:
        with self._group.explained(f"a receive from rank {self._group.names[origin]}"):
            head = torch.zeros(_HEAD, dtype=torch.int64, device=out.device)
            dist.recv(head, group=self._pairs, group_src=origin)
            kind, dims, *sizes = head.tolist()
            sent = told(torch.empty(sizes[:dims], dtype=DTYPES[kind], device="meta"))
            compare_message(sent, out, self._group.names[origin], self._group.names[self.rank])
            if out.nbytes:
                dist.recv(bytes_of(out), group=self._pairs, group_src=origin)
