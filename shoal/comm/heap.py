"""Memory that all workers of a host share, without a name: it goes when the last of them goes, however they end."""

import mmap
import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAGE = mmap.ALLOCATIONGRANULARITY


def anonymous_file(size: int) -> int:
    """A file descriptor of shared memory that no path leads to; on systems without memfd, an unlinked file."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("shoal")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file


class Heap:
    """A symmetric heap: every worker makes the same calls in the same order and so knows every offset."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._end = 0

    def tensor(self, elements: int, dtype: "torch.dtype") -> "torch.Tensor":
        """A zeroed tensor [elements] that is the same memory in every worker. Aligned to a page."""
        import torch

        size = max(1, elements) * dtype.itemsize
        start = self._end
        self._end = start + -(-size // PAGE) * PAGE
        if os.fstat(self._file).st_size < self._end:
            os.ftruncate(self._file, self._end)  # all workers ask for the same growth, so the order does not matter
        memory = mmap.mmap(self._file, size, offset=start)
        return torch.frombuffer(memory, dtype=dtype, count=elements) if elements else torch.empty(0, dtype=dtype)
