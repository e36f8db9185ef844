"""Flat tensors whose memory can be given back in parts, and comes again when it is written."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_CAN_RELEASE = sys.platform == "linux"  # elsewhere, given-back pages do not come again as zeros


class Pages:
    """A tensor [elements] of zeros; on the processor, parts of it can be released. Its address stays the same."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._memory: mmap.mmap | None = None
        self._itemsize = dtype.itemsize
        if device.type == "cpu" and elements:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
            self.tensor = torch.frombuffer(self._memory, dtype=dtype, count=elements)
        else:
            self.tensor = torch.zeros(elements, dtype=dtype, device=device)

    def release(self, start: int, stop: int) -> None:
        """Give the memory of these elements back, as far as it is whole pages: they are zeros from now on."""
        if self._memory is None or not _CAN_RELEASE:
            return
        first = -(-start * self._itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop * self._itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def resident_bytes(tensor: Tensor) -> int:
    """How much of a tensor's memory is there: pages that were never written, or have been given back, are not."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or not size or sys.platform != "linux":
        return size
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    pages = -(-(tensor.data_ptr() + size - start) // mmap.PAGESIZE)
    there = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), there):
        return size
    return min(size, (pages - bytes(there).count(0)) * mmap.PAGESIZE)


def now_and_then(bucket: int, buckets: int) -> bool:
    """Whether memory is measured before this bucket is given back: sixteen times in all, as each time takes a while."""
    return bucket % max(1, buckets // 16) == 0


def give_back_shared(tensor: Tensor) -> None:
    """Give the memory of a part of a heap back, for all who map it, as far as it is whole pages: zeros from now on."""
    if sys.platform != "linux":
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_REMOVE)
