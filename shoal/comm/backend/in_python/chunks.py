"""Collectives on flat tensors over memory that all ranks of a host map: each shows a chunk, all meet, each takes.

A rank has two chunks in turn: when it writes one again, all have met once since they read it."""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor

from shoal.comm.agreement import digest
from shoal.comm.backend.in_python.lines import Lines, Mismatch, Said, Standing
from shoal.comm.backend.in_python.sums import combine

LARGEST_CHUNK, SMALLEST_CHUNK = 1 << 20, 64 << 10  # bytes that a rank shows at a time
MOST_BYTES = 64 << 20  # of a group's memory, as long as chunks need not be smaller than the smallest
KEPT_VIEWS = 64  # sizes of short messages that are ready
ALIGNMENT = 64  # bytes between the pieces of a chunk are a multiple of it, so that every type may begin there


def chunk_bytes(world: int) -> int:
    fitting = MOST_BYTES // (2 * (world + 1)) // mmap.PAGESIZE * mmap.PAGESIZE
    return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, fitting))


def memory_bytes(world: int) -> int:
    """Two chunks a rank, and two for sums."""
    return 2 * (world + 1) * chunk_bytes(world)


@dataclass
class Counted:
    calls: int = 0
    bytes: int = 0
    moving_s: float = 0.0


def bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as bytes [nbytes]: writing there is no operation on the tensor itself."""
    return tensor.data.reshape(-1).view(torch.uint8)


class Chunks:
    """All tensors are contiguous; ``words`` say what is asked for, and are compared before anything is written."""

    def __init__(self, file: int, lines: Lines) -> None:
        self.lines = lines
        self.place, self.world = lines.place, lines.world
        self.counted: dict[str, Counted] = {}
        self.waiting_s: dict[str, dict[int, float]] = {}
        self._chunk = chunk_bytes(self.world)
        self._memory = mmap.mmap(file, memory_bytes(self.world))
        whole = torch.frombuffer(self._memory, dtype=torch.uint8).view(self.world + 1, 2, self._chunk)
        self._shown = [list(whole[:-1, half]) for half in range(2)]  # [half][rank]
        self._sums = list(whole[-1])
        self._views: dict[tuple[int, torch.dtype, int], list[Tensor]] = {}
        self._half = 0
        self._operation = 0

    def meet(self, name: str, words: str, nbytes: int, limit_s: float, data: bytes = b"") -> list[Said]:
        """Begin an operation: what all ranks say. Raises Mismatch, on all of them, unless their words are the same."""
        self._operation += 1
        self.lines.standing = Standing(self._operation, words, nbytes)
        self.lines.check_owner()
        counted = self.counted.setdefault(name, Counted())
        counted.calls += 1
        counted.bytes += nbytes
        said = self.lines.meet(words, data, limit_s)
        if any(other.words != words or other.operation != self._operation for other in said):
            raise Mismatch(f"{self.lines.described()}: collective mismatch, nothing was written: {differences(said)}")
        return said

    def counting(self, name: str, act: Callable[[], None]) -> None:
        """Time an operation: what it waited for each rank, and what it did itself."""
        before, begun = dict(self.lines.waited_s), monotonic()
        try:
            act()
        finally:
            spent = monotonic() - begun
            waits = self.waiting_s.setdefault(name, dict.fromkeys(before, 0.0))
            for rank, seconds in self.lines.waited_s.items():
                waits[rank] += seconds - before[rank]
                spent -= seconds - before[rank]
            self.counted.setdefault(name, Counted()).moving_s += max(0.0, spent)

    def _rounds(
        self,
        words: str,
        name: str,
        nbytes: int,
        limit_s: float,
        longest: int,
        step: int,
        show: Callable[[Tensor, int], None],
        take: Callable[[Sequence[Tensor], int], None],
    ) -> None:
        """``show(own chunk, begin)``, meet, ``take(all chunks, begin)``, for begin = 0, step, ... below ``longest``."""
        for begin in range(0, max(1, longest), step):
            self._half ^= 1
            show(self._shown[self._half][self.place], begin)
            if begin == 0:
                self.meet(name, words, nbytes, limit_s)
            else:
                self.lines.meet(timeout_s=limit_s)
            take(self._shown[self._half], begin)

    def all_reduce(self, data: Tensor, reduction: str, words: str, limit_s: float) -> None:
        """In place."""
        several = self.world > 2
        if data.nbytes <= (SMALLEST_CHUNK // 2 if several else self._chunk):
            self._all_reduce_at_once(data, reduction, words, limit_s)
            return
        flat, kind = bytes_of(data), data.dtype

        def show(own: Tensor, begin: int) -> None:
            piece = flat[begin : begin + self._chunk]
            own[: len(piece)] = piece

        def take(chunks: Sequence[Tensor], begin: int) -> None:
            piece = flat[begin : begin + self._chunk]
            parts = [chunk[: len(piece)].view(kind) for chunk in chunks]
            if not several or len(piece) <= SMALLEST_CHUNK // 2:  # as in `_all_reduce_at_once`
                combine(parts, piece.view(kind), reduction)
                return
            # each adds up its part of the chunk, once for all
            sums = self._sums[self._half][: len(piece)]
            count = len(piece) // kind.itemsize
            share = -(-count // self.world)
            own = slice(min(count, self.place * share), min(count, (self.place + 1) * share))
            combine([part[own] for part in parts], sums.view(kind)[own], reduction)
            self.lines.meet(timeout_s=limit_s)
            piece.copy_(sums)

        self._rounds(words, "all_reduce", len(flat), limit_s, len(flat), self._chunk, show, take)

    def _all_reduce_at_once(self, data: Tensor, reduction: str, words: str, limit_s: float) -> None:
        """Of what a chunk holds, where one adding up costs less than another meeting."""
        own = data.data.view(-1)
        self._half ^= 1
        shown = self._typed(self._half, data.dtype, data.nbytes)
        shown[self.place].copy_(own)
        self.meet("all_reduce", words, data.nbytes, limit_s)
        combine(shown, own, reduction)

    def _typed(self, half: int, dtype: torch.dtype, nbytes: int) -> list[Tensor]:
        """The first bytes of all ranks' chunks. Views are kept: making them takes as long as a short message."""
        found = self._views.get((half, dtype, nbytes))
        if found is None:
            if len(self._views) >= KEPT_VIEWS:
                self._views.clear()
            found = [chunk[:nbytes].view(dtype) for chunk in self._shown[half]]
            self._views[half, dtype, nbytes] = found
        return found

    def reduce(self, data: Tensor, root: int, reduction: str, words: str, limit_s: float) -> None:
        """In place on the root; the others keep what they have."""
        flat, kind = bytes_of(data), data.dtype

        def show(own: Tensor, begin: int) -> None:
            piece = flat[begin : begin + self._chunk]
            own[: len(piece)] = piece

        def take(chunks: Sequence[Tensor], begin: int) -> None:
            if self.place == root:
                piece = flat[begin : begin + self._chunk]
                combine([chunk[: len(piece)].view(kind) for chunk in chunks], piece.view(kind), reduction)

        self._rounds(words, "reduce", len(flat), limit_s, len(flat), self._chunk, show, take)

    def broadcast(self, data: Tensor, root: int, words: str, limit_s: float) -> None:
        flat = bytes_of(data)

        def show(own: Tensor, begin: int) -> None:
            if self.place == root:
                piece = flat[begin : begin + self._chunk]
                own[: len(piece)] = piece

        def take(chunks: Sequence[Tensor], begin: int) -> None:
            if self.place != root:
                piece = flat[begin : begin + self._chunk]
                piece.copy_(chunks[root][: len(piece)])

        self._rounds(words, "broadcast", len(flat), limit_s, len(flat), self._chunk, show, take)

    def all_gather(
        self, name: str, source: Tensor, outs: Sequence[Tensor] | None, longest: int, words: str, limit_s: float
    ) -> None:
        """``outs[r]`` takes rank r's source; None where this rank takes nothing, as in a gather to another one."""
        flat = bytes_of(source)
        flats = [] if outs is None else [bytes_of(out) for out in outs]

        def show(own: Tensor, begin: int) -> None:
            piece = flat[begin : begin + self._chunk]
            own[: len(piece)] = piece

        def take(chunks: Sequence[Tensor], begin: int) -> None:
            for rank, into in enumerate(flats):
                piece = into[begin : begin + self._chunk]
                piece.copy_(flat[begin : begin + self._chunk] if rank == self.place else chunks[rank][: len(piece)])

        self._rounds(words, name, sum(map(len, flats)) or len(flat), limit_s, longest, self._chunk, show, take)

    def _pieces(self, itemsize: int) -> int:
        """Bytes of a chunk that each rank has for each other one."""
        return max(itemsize, self._chunk // self.world // ALIGNMENT * ALIGNMENT)

    def reduce_scatter(self, ins: Sequence[Tensor], out: Tensor, reduction: str, words: str, limit_s: float) -> None:
        """``ins[r]`` goes to rank r, who takes the reduction of all ranks'."""
        flats, into, kind = [bytes_of(part) for part in ins], bytes_of(out), out.dtype
        step = self._pieces(kind.itemsize)

        def take(chunks: Sequence[Tensor], begin: int) -> None:
            piece = into[begin : begin + step]
            first = self.place * step
            if len(piece):
                parts = [chunk[first : first + len(piece)].view(kind) for chunk in chunks]
                combine(parts, piece.view(kind), reduction)

        nbytes, longest = sum(map(len, flats)), max(map(len, flats))
        self._rounds(words, "reduce_scatter", nbytes, limit_s, longest, step, self._for_each(flats, step), take)

    def scatter(self, ins: Sequence[Tensor] | None, out: Tensor, root: int, words: str, limit_s: float) -> None:
        """``ins[r]``, of the root alone, goes to rank r."""
        flats, into = [bytes_of(part) for part in ins or ()], bytes_of(out)
        step = self._pieces(out.itemsize)

        def take(chunks: Sequence[Tensor], begin: int) -> None:
            piece = into[begin : begin + step]
            piece.copy_(chunks[root][self.place * step : self.place * step + len(piece)])

        nbytes = sum(map(len, flats)) or len(into)
        self._rounds(words, "scatter", nbytes, limit_s, len(into), step, self._for_each(flats, step), take)

    @staticmethod
    def _for_each(flats: Sequence[Tensor], step: int) -> Callable[[Tensor, int], None]:
        """Shows the next bytes for every rank, ``step`` apart."""

        def show(own: Tensor, begin: int) -> None:
            for rank, flat in enumerate(flats):
                piece = flat[begin : begin + step]
                own[rank * step : rank * step + len(piece)] = piece

        return show

    def all_to_all(self, ins: Sequence[Tensor], outs: Sequence[Tensor], words: str, limit_s: float) -> None:
        """``ins[r]`` goes to rank r, ``outs[r]`` comes from there; the numbers of elements are compared too."""
        flats, intos = [bytes_of(part) for part in ins], [bytes_of(out) for out in outs]
        step = self._pieces(max((part.itemsize for part in ins), default=1))
        row = torch.tensor([[t.numel() for t in ins], [t.numel() for t in outs]]).numpy().tobytes()
        said = self.meet("all_to_all", words, max(sum(map(len, flats)), sum(map(len, intos))), limit_s, row)
        counts = torch.stack([torch.frombuffer(bytearray(one.data), dtype=torch.int64).view(2, -1) for one in said])
        sent, expected = counts[:, 0], counts[:, 1].t()  # [from][to]
        wrong = [
            f"rank {origin} sends {sent[origin, to]} elements to rank {to}, which expects {expected[origin, to]}"
            for origin, to in (sent != expected).nonzero().tolist()
        ]
        if wrong:
            raise Mismatch(
                f"{self.lines.described()}: collective mismatch, nothing was written: {'; '.join(wrong[:8])}"
            )
        show = self._for_each(flats, step)
        for begin in range(0, int(sent.max()) * ins[0].itemsize, step):
            self._half ^= 1
            show(self._shown[self._half][self.place], begin)
            self.lines.meet(timeout_s=limit_s)
            for rank, into in enumerate(intos):
                piece = into[begin : begin + step]
                first = self.place * step
                piece.copy_(self._shown[self._half][rank][first : first + len(piece)])


def differences(said: Sequence[Said]) -> str:
    """ "rank 0 wants A; ranks 1, 2 want B" """
    wishes: dict[str, list[int]] = {}
    for rank, one in enumerate(said):
        wishes.setdefault(f"{one.words}, operation {one.operation}", []).append(rank)
    return "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} "
        f"{'wants' if len(ranks) == 1 else 'want'} {wish}"
        for wish, ranks in wishes.items()
    )


def wording(
    name: str,
    tensor: Tensor | None = None,
    *,
    reduction: str = "",
    count: int | None = None,
    sizes: Sequence[int] = (),
    root: int = -1,
) -> str:
    """ "all_reduce(sum, float32, 4 elements)": equal where the ranks ask for the same."""
    if tensor is None:
        return name
    elements = tensor.numel() if count is None else count
    parts = [reduction] if reduction else []
    parts.append(str(tensor.dtype).removeprefix("torch."))
    if count != -1:
        parts.append(f"{elements} element{'' if elements == 1 else 's'}")
    if len(set(sizes)) > 1:
        parts.append(f"sizes {digest(str(list(sizes))) % 65536}")
    if root >= 0:
        parts.append(f"root {root}")
    return f"{name}({', '.join(parts)})"
