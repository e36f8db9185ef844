"""Copies of what is too much for the caches: lines of memory that are overwritten whole need not be read first."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.comm.native import build

LEAST_BYTES = 16 << 20  # of all that is copied in a row: less may still lie in a cache when its reader comes
MOST_THREADS = 2  # from here on torch's own copy, on so many threads, is as fast as this one on one


def copier(nbytes: int) -> Callable[[Tensor, Tensor], object]:
    """(into, source) -> ...: what copies so many bytes, one tensor after the other, best: `copy`, or torch's own."""
    pays = nbytes >= LEAST_BYTES and torch.get_num_threads() <= MOST_THREADS and build.kernels() is not None
    return copy if pays else Tensor.copy_


def copy(into: Tensor, source: Tensor) -> None:
    """``into.copy_(source)``, for two tensors of one shape that do not overlap; torch does what is not a plain copy."""
    plain = into.dtype == source.dtype and into.device.type == source.device.type == "cpu"
    library = build.kernels() if plain and into.is_contiguous() and source.is_contiguous() else None
    if library is None or source.is_conj() or source.is_neg():
        into.copy_(source)
        return
    addresses = (ctypes.c_void_p(into.data_ptr()), ctypes.c_void_p(source.data_ptr()))
    library.shoal_copy_past_cache(*addresses, ctypes.c_int64(source.nbytes))
