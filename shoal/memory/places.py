"""Where bytes go that need not stay beside the computation: the host's memory, or its disk.

Called from one background thread, which waits for the device; what computes does not."""

from typing import Protocol

import torch
from torch import Tensor

from shoal.memory.extents import Extent, ExtentFile


class Place(Protocol):
    name: str

    def put(self, raw: Tensor) -> object:
        """Copy bytes, uint8 [n], from whatever device; they are there when it returns. Raises OSError where full."""

    def take(self, where: object, into: Tensor) -> None:
        """Fill ``into``, uint8 [n], with what was put. Raises OSError."""

    def drop(self, where: object) -> None:
        """What was put there is not needed any more."""


class Host:
    """The host's memory, page-locked for an accelerator; what was let go is used again."""

    name = "host"

    def __init__(self, device: torch.device) -> None:
        self._pin = device.type == "cuda"
        self._stream = _stream(device)
        self._free: dict[int, list[Tensor]] = {}

    def put(self, raw: Tensor) -> Tensor:
        free = self._free.get(raw.numel())
        held = free.pop() if free else torch.empty(raw.numel(), dtype=torch.uint8, pin_memory=self._pin)
        copy(raw, held, self._stream)
        return held

    def take(self, where: object, into: Tensor) -> None:
        assert isinstance(where, Tensor)
        copy(where, into, self._stream)

    def drop(self, where: object) -> None:
        assert isinstance(where, Tensor)
        self._free.setdefault(where.numel(), []).append(where)


class Disk:
    """A file without a name. An accelerator's bytes go by way of one page-locked buffer."""

    name = "disk"

    def __init__(self, device: torch.device, folder: str) -> None:
        """Raises UserError when there can be no file in ``folder``."""
        self.file = ExtentFile(folder)
        self._stream = _stream(device)
        self._staged = torch.empty(0, dtype=torch.uint8)

    def put(self, raw: Tensor) -> Extent:
        extent = self.file.reserve(raw.numel())
        try:
            held = raw if self._stream is None else self._stage(raw.numel())
            if held is not raw:
                copy(raw, held, self._stream)
            self.file.write(extent, held.numpy().data)
        except OSError:
            self.file.release(extent)
            raise
        return extent

    def take(self, where: object, into: Tensor) -> None:
        assert isinstance(where, Extent)
        held = into if self._stream is None else self._stage(into.numel())
        self.file.read(where, held.numpy().data)
        if held is not into:
            copy(held, into, self._stream)

    def drop(self, where: object) -> None:
        assert isinstance(where, Extent)
        self.file.release(where)

    def _stage(self, size: int) -> Tensor:
        if self._staged.numel() < size:
            self._staged = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._staged[:size]


def _stream(device: torch.device) -> "torch.cuda.Stream | None":
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def copy(source: Tensor, into: Tensor, stream: "torch.cuda.Stream | None") -> None:
    """On a stream of its own beside the computation; done when it returns."""
    if stream is None:
        into.copy_(source)
        return
    with torch.cuda.stream(stream):
        into.copy_(source, non_blocking=True)
    stream.synchronize()
