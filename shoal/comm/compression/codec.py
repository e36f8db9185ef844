"""A codec: float32 numbers to a payload of known size and back, in one pass, with what is lost fed back.

A payload is 16 bytes that say what it is, then the codec's own body, padded to a multiple of 16 bytes. Its size and its
bytes depend on nothing but the numbers; what a receiver gets is checked before any of it is used.
"""

import struct
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from shoal.comm.compression import fused
from shoal.errors import ShoalError, UserError

HEAD = struct.Struct("<4sB3xQ")  # magic and version, kind of codec, elements
MAGIC = b"SHc1"
MOST_ELEMENTS = 2**32 - 1  # of one payload: positions are 32 bits wide
NAN_BITS = 0x7FC00000  # the one NaN that is ever written
INFINITY_BITS = 0x7F800000  # magnitudes (the bits without the sign) from here on are not finite


class BadPayload(ShoalError):
    """What arrived is not what was to be sent."""


class Codec(ABC):
    """How float32 numbers become a payload. Frozen: whatever changes from step to step lies in the error tensors.

    ``compress`` takes gradient + error; what the payload does not say of it is the new error. With no error tensor,
    it is lost. Numbers that are not finite arrive as NaN or as themselves, and never stay in the error."""

    name: ClassVar[str]
    kind: ClassVar[int]  # in the payload's head

    @abstractmethod
    def body_bytes(self, elements: int) -> int:
        """Size of the body for so many elements."""

    def payload_bytes(self, elements: int) -> int:
        return -(-(HEAD.size + self.body_bytes(elements)) // 16) * 16

    def ratio(self, elements: int) -> float:
        """How many times smaller than float32."""
        return 4 * elements / self.payload_bytes(elements)

    @final
    def compress(self, gradient: Tensor, error: Tensor | None, payload: Tensor) -> None:
        """gradient [n] float32, error [n] float32 or None (in, out) -> payload [payload_bytes(n)] uint8."""
        elements = self._check(gradient, payload)
        if error is not None:
            self._check(error, payload)
        payload[: HEAD.size] = _head(self.kind, elements, payload.device)
        payload[HEAD.size + self.body_bytes(elements) :] = 0
        if not elements:
            payload[HEAD.size :] = 0
            return
        if error is not None and error.data_ptr() == gradient.data_ptr():
            raise UserError(f"{self.name}: the error needs memory of its own, beside the gradient's.")
        body = payload[HEAD.size :]
        if fused.usable(gradient):
            self._compress_fused(gradient, error, body)
        else:
            self._compress_plain(gradient, error, body)

    @final
    def add(self, payload: Tensor, into: Tensor) -> None:
        """into [n] float32 += what the payload says. Raises BadPayload."""
        self._open(payload, into, add=True)

    @final
    def restore(self, payload: Tensor, into: Tensor) -> None:
        """into [n] float32 = what the payload says. Raises BadPayload."""
        self._open(payload, into, add=False)

    def _open(self, payload: Tensor, into: Tensor, *, add: bool) -> None:
        elements = self._check(into, payload)
        if payload.device.type == "cpu":  # elsewhere, looking would wait for the device
            said = bytes(payload[: HEAD.size].numpy())
            if said != HEAD.pack(MAGIC, self.kind, elements):
                raise BadPayload(f"expected {self.name} of {elements} elements, got a payload that {_says(said)}")
        if not elements:
            return
        body = payload[HEAD.size :]
        if fused.usable(into):
            self._open_fused(body, into, add=add)
        elif add:
            self._add_plain(body, into)
        else:
            into.copy_(self._opened_plain(body, elements))

    def _check(self, numbers: Tensor, payload: Tensor) -> int:
        elements = numbers.numel()
        if numbers.dtype != torch.float32 or numbers.dim() != 1 or not numbers.is_contiguous():
            raise UserError(f"{self.name}: numbers must be a contiguous float32 vector, got {_described(numbers)}.")
        if elements > MOST_ELEMENTS:
            raise UserError(f"{self.name}: {elements} elements are too many for one payload; cut them up.")
        if payload.dtype != torch.uint8 or payload.shape != (self.payload_bytes(elements),):
            raise BadPayload(
                f"{self.name} of {elements} elements takes {self.payload_bytes(elements)} bytes, "
                f"got {_described(payload)}"
            )
        return elements

    @abstractmethod
    def _compress_fused(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None: ...

    @abstractmethod
    def _open_fused(self, body: Tensor, into: Tensor, *, add: bool) -> None: ...

    @abstractmethod
    def _compress_plain(self, gradient: Tensor, error: Tensor | None, body: Tensor) -> None: ...

    @abstractmethod
    def _opened_plain(self, body: Tensor, elements: int) -> Tensor: ...

    def _add_plain(self, body: Tensor, into: Tensor) -> None:
        into.add_(self._opened_plain(body, into.numel()))


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@lru_cache(maxsize=1024)
def _head(kind: int, elements: int, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(HEAD.pack(MAGIC, kind, elements)), dtype=torch.uint8).to(device)


def _says(head: bytes) -> str:
    magic, kind, elements = HEAD.unpack(head)
    return f"says kind {kind}, {elements} elements" if magic == MAGIC else f"begins with {magic!r}"


# --- what the plain twins share -----------------------------------------------------------------------------------


def wanted(gradient: Tensor, error: Tensor | None) -> Tensor:
    """What is to be sent: the gradient and, with error feedback, what earlier steps left unsent."""
    return gradient if error is None else gradient + error


def magnitude_bits(values: Tensor) -> Tensor:
    """int32, in the order of magnitudes; NaN is above infinity."""
    return values.contiguous().view(torch.int32) & 0x7FFFFFFF


def in_blocks(values: Tensor, block: int) -> Tensor:
    """[n] -> [ceil(n / block), block], padded with zeros."""
    blocks = -(-values.numel() // block)
    return torch.nn.functional.pad(values, (0, blocks * block - values.numel())).view(blocks, block)
