"""Where tensors that are used once a step lie meanwhile: in memory, in the host's, or in a file mapped into memory.

What lies on a shelf is a tensor like any other to who reads it; it is written through the shelf alone.
"""

import mmap
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shoal.memory.extents import Extent, ExtentFile

SMALLEST = 4096  # elements: less is not worth moving
_COPIED = 1 << 20  # elements at a time


class Shelf(Protocol):
    """Flat ranges are of elements, in the order of memory."""

    def make(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on this shelf. Raises OSError when there is no room."""

    def holds(self, tensor: Tensor) -> bool: ...

    def read(self, tensor: Tensor, start: int, end: int) -> Tensor:
        """The elements where they are computed with: not to be written to, unless they are ``tensor`` itself."""

    def write(self, tensor: Tensor, start: int, values: Tensor) -> None:
        """Raises OSError; what has been written is not known then."""

    def ahead(self, tensors: Iterable[Tensor]) -> None:
        """These will be needed soon."""

    def done(self, tensors: Iterable[Tensor]) -> None:
        """These will not be needed for a while."""


class Here:
    """The memory of the device that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device == self._device

    def read(self, tensor: Tensor, start: int, end: int) -> Tensor:
        return tensor.view(-1)[start:end]

    def write(self, tensor: Tensor, start: int, values: Tensor) -> None:
        target = tensor.view(-1)[start : start + values.numel()]
        if target.data_ptr() != values.data_ptr():
            target.copy_(values)

    def ahead(self, tensors: Iterable[Tensor]) -> None: ...
    def done(self, tensors: Iterable[Tensor]) -> None: ...


class OnHost(Here):
    """The host's memory, page-locked, for what an accelerator computes with."""

    def make(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.is_pinned()

    def read(self, tensor: Tensor, start: int, end: int) -> Tensor:
        return tensor.view(-1)[start:end].to(self._device, non_blocking=True)


class OnDisk:
    """A file without a name, mapped: the system keeps as much of it in memory as there is room for.

    Written by write(2), never through the mapping: where the disk gives out, that is an error and not the end of the
    process. What is not needed for a while leaves the process's memory; what is needed soon is read ahead."""

    def __init__(self, device: torch.device, folder: str | Path = "") -> None:
        """Raises UserError when there can be no file in ``folder``."""
        self.file = ExtentFile(folder)
        self._device = device
        self._maps: dict[int, tuple[mmap.mmap, Extent]] = {}  # address -> what is mapped there
        _FILES.add(self)
        self.close = weakref.finalize(self, self.file.close)  # what is mapped stays mapped

    def copied(self, tensor: Tensor, into: Tensor) -> None:
        """The whole of a tensor on this shelf into another one on it; neither stays in memory. Raises OSError."""
        for start in range(0, tensor.numel(), _COPIED):
            self.write(into, start, tensor.view(-1)[start : start + _COPIED])
            self.done([tensor, into])

    def make(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        extent = self.file.reserve(shape.numel() * dtype.itemsize)
        mapped = mmap.mmap(self.file.number, extent.size, offset=extent.start)
        tensor = torch.frombuffer(mapped, dtype=dtype, count=shape.numel()).view(shape)
        self._maps[tensor.data_ptr()] = (mapped, extent)
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() in self._maps

    def read(self, tensor: Tensor, start: int, end: int) -> Tensor:
        return tensor.view(-1)[start:end].to(self._device)

    def write(self, tensor: Tensor, start: int, values: Tensor) -> None:
        _, extent = self._maps[tensor.data_ptr()]
        first = start * tensor.element_size()
        raw = values.cpu().view(torch.uint8).numpy()
        self.file.write(Extent(extent.start + first, extent.size - first), raw.data)

    def ahead(self, tensors: Iterable[Tensor]) -> None:
        self._advise(tensors, mmap.MADV_WILLNEED)

    def done(self, tensors: Iterable[Tensor]) -> None:
        self._advise(tensors, mmap.MADV_DONTNEED)

    def _advise(self, tensors: Iterable[Tensor], advice: int) -> None:
        for tensor in tensors:
            found = self._maps.get(tensor.data_ptr())
            if found is not None:
                found[0].madvise(advice)


_FILES: "weakref.WeakSet[OnDisk]" = weakref.WeakSet()


def file_of(tensor: Tensor) -> OnDisk | None:
    """The file that a tensor lies in, if it lies in one."""
    return next((shelf for shelf in _FILES if shelf.holds(tensor)), None)
