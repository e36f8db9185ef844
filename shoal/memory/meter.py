"""Counting the bytes that are held for backward passes."""

import threading
from collections.abc import Callable, Iterable

from torch import Tensor


class Hold:
    """A share in the memory of a tensor, counted for as long as this object lives."""

    __slots__ = ("_key", "_meter", "tensor")

    def __init__(self, meter: "Meter", tensor: Tensor, key: int) -> None:
        self._meter, self.tensor, self._key = meter, tensor, key

    def get(self) -> Tensor:
        return self.tensor

    def __del__(self) -> None:
        self._meter._release(self._key)


class Meter:
    """Live bytes; memory that several tensors share is counted once, that of parameters never.

    Several threads may hold and let go."""

    def __init__(self) -> None:
        self.live = 0
        self._lock = threading.RLock()  # letting go may come in the middle of holding
        self._held: dict[int, list[int]] = {}  # storage -> holds, bytes
        self._ignored: set[int] = set()
        self.elsewhere: Callable[[Tensor], bool] = lambda _: False  # another process holds its memory

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Memory that is there anyway: parameters and buffers."""
        self._ignored = {storage_of(tensor) for tensor in tensors}

    def storages(self) -> set[int]:
        """All that is counted now, and all that never is."""
        return self._ignored | self._held.keys()

    def ignores(self, tensor: Tensor) -> bool:
        return storage_of(tensor) in self._ignored

    def hold(self, tensor: Tensor) -> Hold:
        key = storage_of(tensor)
        with self._lock:
            if key in self._ignored or self.elsewhere(tensor):
                key = 0
            elif key in self._held:
                self._held[key][0] += 1
            else:
                count = bytes_of(tensor)
                self._held[key] = [1, count]
                self.live += count
        return Hold(self, tensor, key)

    def _release(self, key: int) -> None:
        if key == 0:
            return
        with self._lock:
            held = self._held[key]
            held[0] -= 1
            if held[0] == 0:
                del self._held[key]
                self.live -= held[1]


def storage_of(tensor: Tensor) -> int:
    """A number for the memory that a tensor lies in, unique while it lives."""
    return int(tensor.untyped_storage()._cdata)


def bytes_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def sizes_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each memory that these lie in: memory that several share is there once."""
    return {storage_of(tensor): bytes_of(tensor) for tensor in tensors}
