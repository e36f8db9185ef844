"""What torch holds on a device, and the most of it at once."""

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shoal.comm.native import build
from shoal.memory.meter import bytes_of, storage_of


class Gauge(Protocol):
    """Bytes on one device. ``exact``: the allocator's own count, else that of the results of operations."""

    exact: bool

    def live(self) -> int: ...

    def peak(self) -> int:
        """The most bytes at once since the last `restart`."""

    def restart(self) -> None: ...

    def watching(self) -> contextlib.AbstractContextManager[object]:
        """Bytes are counted inside, by a gauge that does not count all the time."""


def gauge_for(device: torch.device) -> Gauge:
    """The best there is. On a processor it counts what is made from now on."""
    if device.type == "cuda":
        return _Accelerator(device)
    library = build.allocator()
    return Traced() if library is None else _Allocator(library)


def taken_bytes(device: torch.device) -> int:
    """What the process takes of a device's memory right now; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


class _Accelerator:
    exact = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def live(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        yield
        torch.cuda.synchronize(self._device)


class _Allocator:
    """Counted in native/allocator/arena.cpp."""

    exact = True

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for function in (library.shoal_memory_live, library.shoal_memory_peak):
            function.restype = ctypes.c_int64
        library.shoal_memory_count()

    def live(self) -> int:
        return int(self._library.shoal_memory_live())

    def peak(self) -> int:
        return int(self._library.shoal_memory_peak(0))

    def restart(self) -> None:
        self._library.shoal_memory_peak(1)

    def watching(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class Traced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operations give while it watches: a little slower, and blind to what a kernel takes for itself."""

    exact = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self._live = self._peak = 0

    def live(self) -> int:
        return self._live

    def peak(self) -> int:
        return self._peak

    def restart(self) -> None:
        self._peak = self._live

    def watching(self) -> contextlib.AbstractContextManager[object]:
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in known:
                self._made(tensor)
        return result

    def _made(self, tensor: Tensor) -> None:
        key, size = storage_of(tensor), bytes_of(tensor)
        if key in self._sizes:
            return
        self._sizes[key] = size
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(tensor.untyped_storage(), self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)
