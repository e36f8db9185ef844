"""What becomes of memory that is freed, under glibc; elsewhere it is left to the allocator."""

import ctypes
from contextlib import suppress


def keep_freed_memory() -> None:
    """Hand freed tensors out again instead of giving their pages back, which costs a fault each next time."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: its largest value
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def give_back_freed_memory() -> None:
    """Now, once: pages to the system, and the end of the heap to what else may ask for address space."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
