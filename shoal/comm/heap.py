"""Memory that all workers of a host share, without a name: it goes when the last of them goes, however they end."""

import mmap
import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAGE = mmap.ALLOCATIONGRANULARITY
PART_BYTES = 1 << 40  # of addresses that the heap of a part of the workers has: what is not touched costs nothing
MOST_WORKERS, MOST_PARTS = 1 << 10, 1 << 20


def anonymous_file(size: int) -> int:
    """A file descriptor of shared memory that no path leads to; on systems without memfd, an unlinked file."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("shoal")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file


def heap_file() -> int:
    """What a `Heap` lies on: as large as the address range of all of its parts, so that nobody has to make it grow."""
    return anonymous_file(MOST_PARTS * PART_BYTES)


class Heap:
    """A symmetric heap: every worker makes the same calls in the same order and so knows every offset.

    A part of the workers has a heap of its own, further on in the same file."""

    def __init__(self, file: int, number: int = 0) -> None:
        self._file = file
        self._end = number * PART_BYTES

    def part(self, number: int, first: int) -> "Heap":
        """The heap of some of the workers, of whom ``first`` is one that has not had this ``number`` (from 1) before.

        Workers of other parts may count alike, when parts are split again: their first one tells them apart."""
        return Heap(self._file, number * MOST_WORKERS + first)

    def tensor(self, elements: int, dtype: "torch.dtype") -> "torch.Tensor":
        """A zeroed tensor [elements] that is the same memory in every worker. Aligned to a page."""
        import torch

        size = max(1, elements) * dtype.itemsize
        start = self._end
        self._end = start + -(-size // PAGE) * PAGE
        memory = mmap.mmap(self._file, size, offset=start)
        return torch.frombuffer(memory, dtype=dtype, count=elements) if elements else torch.empty(0, dtype=dtype)
