"""Memory of a worker's own that the other workers of the host can read: what a backward pass makes there can stay.

Every worker has an arena, a mapping that all of them have. While a worker is `inside` its arena, torch's larger tensors
are made in it, so that a gradient needs no copy to be added to those of others. A gradient's place is told as a number
of bytes from the start of the arena.
"""

import ctypes
import mmap
import os
import resource
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING

from shoal.comm.heap import anonymous_file
from shoal.comm.layout import ALIGNMENT
from shoal.comm.native import build

if TYPE_CHECKING:
    import torch

_BYTES = ALIGNMENT * 4  # a cache line: what vector loads like best, and what every slot of the flat buffer starts at


def arena_files(workers: int) -> list[int]:
    """A file a worker, as large as the machine's memory: what is not touched costs nothing.

    [] where there is no use for them, or where a limit on address space (ulimit -v) leaves no room to map them."""
    return [] if workers == 1 else [file for _ in range(workers) for file in own_file()]


def own_file() -> list[int]:
    """One worker's, where others may come later."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return []
    return [anonymous_file(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]


def _mapped(file: int) -> mmap.mmap:
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(file, os.fstat(file).st_size, flags=mmap.MAP_SHARED | reserve)


class Arenas:
    """All workers' arenas, as one of them sees them."""

    def __init__(self, rank: int, files: Sequence[int]) -> None:
        """``files`` as `arena_files` made them, before the workers were forked. Without files nothing is inside."""
        self.rank = rank
        self._maps = [_mapped(file) for file in files]
        self.bases = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self._maps]
        self._size = len(self._maps[rank]) if self._maps else 0
        self._library = build.allocator() if self._maps and build.kernels() else None
        if self._library:
            self._library.shoal_arena_install(ctypes.c_void_p(self.bases[rank]), ctypes.c_size_t(self._size))

    def again(self, rank: int, files: Sequence[int]) -> "Arenas":
        """Those of other workers, in the order of their ranks: this worker's own, of ``rank``, is the one that it has.

        A process has one arena for life: torch's memory lies in it."""
        made = copy(self)
        made.rank = rank
        if self._maps:
            own = self._maps[self.rank]
            made._maps = [own if other == rank else _mapped(file) for other, file in enumerate(files)]
            made.bases = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in made._maps]
        return made

    @property
    def bytes(self) -> int:
        """Of each arena; 0 where there are none."""
        return self._size

    def part(self, ranks: Sequence[int]) -> "Arenas":
        """Those of some of the workers, numbered anew in this order."""
        made = copy(self)
        made.rank = ranks.index(self.rank)
        if self._maps:
            made._maps = [self._maps[rank] for rank in ranks]
            made.bases = [self.bases[rank] for rank in ranks]
        return made

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread's larger tensors are made in this worker's arena."""
        if self._library is None:
            yield
            return
        self._library.shoal_arena_inside(1)
        try:
            yield
        finally:
            self._library.shoal_arena_inside(0)

    def place(self, tensor: "torch.Tensor") -> int | None:
        """Where a tensor lies in this worker's arena, in bytes; None when it lies elsewhere."""
        place = tensor.data_ptr() - self.bases[self.rank] if self._size else -1
        return place if 0 <= place < self._size and place % _BYTES == 0 else None

    def view(self, rank: int, place: int, elements: int, dtype: "torch.dtype") -> "torch.Tensor":
        """What lies at a place of another worker's arena: [elements]."""
        import torch

        return torch.frombuffer(self._maps[rank], dtype=dtype, count=elements, offset=place)

    def find(self, tensor: "torch.Tensor") -> tuple[int, int] | None:
        """Whose arena a tensor lies in, and where, in bytes; None when it lies in none, or not on a cache line."""
        address = tensor.data_ptr()
        for rank, base in enumerate(self.bases):
            if 0 <= address - base < self._size and (address - base) % _BYTES == 0:
                return rank, address - base
        return None

    def is_of_others(self, tensor: "torch.Tensor") -> bool:
        """Whether its memory is another worker's."""
        address = tensor.untyped_storage().data_ptr()
        ranks = [rank for rank, base in enumerate(self.bases) if 0 <= address - base < self._size]
        return bool(ranks) and ranks[0] != self.rank

    def lent(
        self, rank: int, place: int, elements: int, dtype: "torch.dtype", let_go: Callable[[], None]
    ) -> "torch.Tensor":
        """As `view`; ``let_go`` is called once, when nobody in this process uses that memory any more."""
        import torch

        memory = memoryview(self._maps[rank])[place : place + elements * dtype.itemsize]
        weakref.finalize(memory, let_go).atexit = False  # torch holds it as long as any tensor lies in it
        return torch.frombuffer(memory, dtype=dtype, count=elements)


class OwnMemory:
    """For a worker that is alone: it can read all of its memory where it lies."""

    bases = (0,)

    @contextmanager
    def inside(self) -> Iterator[None]:
        yield

    def place(self, tensor: "torch.Tensor") -> int | None:
        return tensor.data_ptr() if tensor.data_ptr() % _BYTES == 0 else None
