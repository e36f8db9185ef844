"""The carrier of workers of one host without the C++ library: bytes on the heap, words over sockets."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.comm.agreement import compare
from shoal.comm.group import HostGroup
from shoal.comm.mesh import Mesh
from shoal.comm.tensors.carrier import Counts, Stood, add_up, bytes_of, compare_message, told

_MEET, _HEAD, _PIECE = 1, 2, 3  # kinds of messages
CHUNK = 1 << 20  # bytes that a rank shows at a time
LONGEST = 16 << 20  # bytes of a message between two


class Messages:
    """Each rank shows its bytes on the heap, chunk by chunk, and the others take what they need.

    A rank has two chunks in turn: when it writes one again, all have met once since they read it."""

    link = "shared memory"

    def __init__(self, own: HostGroup, pairs: HostGroup) -> None:
        """Called by all workers of the group. ``pairs``: the same workers, for messages between two, which come in an
        order of their own."""
        self.rank, self.world, self._names = own.rank, own.world, own.names
        self._mesh, self._pairs = own.mesh, pairs.mesh
        self._shown = [own.heap.tensor(2 * CHUNK, torch.uint8).view(2, CHUNK) for _ in range(own.world)]
        self.stood: Stood = []
        self._clock = own.counters.clock
        self._sequence = 0
        self._operation = 0

    def _meet(self, words: str) -> list[str]:
        """What all ranks say, by rank, when all have come here."""
        self._sequence += 1
        said = [words] * self.world
        self._mesh.broadcast(_MEET, self._sequence, words.encode())
        for rank in self._mesh.others:
            said[rank] = self._heard(self._mesh, rank, _MEET, self._sequence).decode()
        return said

    def _heard(self, mesh: Mesh, rank: int, kind: int, sequence: int) -> bytes:
        """What a rank says next; the wait for it is told."""
        asked = self._clock()
        words = mesh.receive(rank, kind, sequence)
        self.stood.append((rank, self._clock() - asked))
        return words

    def _show(
        self, mine: Tensor, lengths: Sequence[int], signature: str, take: Callable[[int, list[Tensor]], None]
    ) -> None:
        """Show ``mine`` (bytes) to all; ``lengths`` are those of all ranks.

        ``take(begin, chunks)`` gets all ranks' bytes from there on: [at most CHUNK] each."""
        for begin in range(0, max(1, *lengths), CHUNK):
            half = self._sequence % 2
            piece = mine[begin : begin + CHUNK]
            self._shown[self.rank][half, : len(piece)] = piece
            said = self._meet("" if begin else signature)
            if begin == 0:
                self._operation += 1
            compare(said, self._names, self._operation)
            sizes = [max(0, min(CHUNK, length - begin)) for length in lengths]
            take(begin, [shown[half, :size] for shown, size in zip(self._shown, sizes, strict=True)])

    def all_reduce(self, source: Tensor, out: Tensor, signature: str) -> None:
        flat = bytes_of(out)

        def take(begin: int, chunks: list[Tensor]) -> None:
            into = flat[begin : begin + CHUNK].view(out.dtype)
            add_up([chunk.view(out.dtype) for chunk in chunks], into)

        self._show(bytes_of(source), [source.nbytes] * self.world, signature, take)

    def all_gather(self, source: Tensor, outs: Sequence[Tensor], signature: str) -> None:
        flats = [bytes_of(out) for out in outs]

        def take(begin: int, chunks: list[Tensor]) -> None:
            for flat, chunk in zip(flats, chunks, strict=True):
                flat[begin : begin + len(chunk)] = chunk

        self._show(bytes_of(source), [out.nbytes for out in outs], signature, take)

    def reduce_scatter(self, sources: Sequence[Tensor], out: Tensor, signature: str) -> None:
        flat = bytes_of(out)
        first = sum(source.nbytes for source in sources[: self.rank])

        def take(begin: int, chunks: list[Tensor]) -> None:
            start, stop = max(first, begin), min(first + len(flat), begin + CHUNK)
            if start < stop:
                parts = [chunk[start - begin : stop - begin].view(out.dtype) for chunk in chunks]
                add_up(parts, flat[start - first : stop - first].view(out.dtype))

        mine = torch.cat([bytes_of(source) for source in sources])
        self._show(mine, [len(mine)] * self.world, signature, take)

    def all_to_all(self, sources: Sequence[Tensor], outs: Sequence[Tensor], counts: Counts, signature: str) -> None:
        """Rank r shows what it has for rank 0, for rank 1, ...; this rank's begins at ``firsts[r]``."""
        size = outs[0].itemsize
        firsts = [size * sum(row[: self.rank]) for row in counts]
        flats = [bytes_of(out) for out in outs]

        def take(begin: int, chunks: list[Tensor]) -> None:
            for first, flat, chunk in zip(firsts, flats, chunks, strict=True):
                start, stop = max(first, begin), min(first + len(flat), begin + len(chunk))
                if start < stop:
                    flat[start - first : stop - first] = chunk[start - begin : stop - begin]

        mine = torch.cat([bytes_of(source) for source in sources])
        self._show(mine, [size * sum(row) for row in counts], signature, take)

    def broadcast(self, data: Tensor, root: int, signature: str) -> None:
        flat = bytes_of(data)

        def take(begin: int, chunks: list[Tensor]) -> None:
            if self.rank != root:
                flat[begin : begin + CHUNK] = chunks[root]

        lengths = [data.nbytes if rank == root else 0 for rank in range(self.world)]
        self._show(flat[: lengths[self.rank]], lengths, signature, take)

    def barrier(self) -> None:
        self._show(torch.empty(0, dtype=torch.uint8), [0] * self.world, "barrier", lambda begin, chunks: None)

    def send(self, data: Tensor, to: int) -> None:
        self._pairs.send(to, _HEAD, 0, told(data).encode())
        for piece in torch.split(bytes_of(data), LONGEST):
            self._pairs.send(to, _PIECE, 0, piece.numpy().tobytes())

    def receive(self, out: Tensor, origin: int) -> None:
        sent = self._heard(self._pairs, origin, _HEAD, 0).decode()
        compare_message(sent, out, self._names[origin], self._names[self.rank])
        for piece in torch.split(bytes_of(out), LONGEST):
            payload = self._pairs.receive(origin, _PIECE, 0)
            if payload:
                piece.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
