"""Messages to frames and back: a length, then a msgpack array of tagged structs. Works on bytes; owns no socket."""

import struct
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from shoal.serve.engine import FromEngine, ToEngine

LIMIT_BYTES = 256 << 20  # of one frame
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
M = TypeVar("M")


class FrameError(Exception):
    """What came is not a frame: the peer is broken, and its connection of no more use."""


def encode(messages: Sequence[msgspec.Struct]) -> bytes:
    """One frame. Raises FrameError when it is longer than LIMIT_BYTES."""
    buffer = bytearray(_LENGTH.size)
    _encoder.encode_into(list(messages), buffer, _LENGTH.size)
    length = len(buffer) - _LENGTH.size
    if length > LIMIT_BYTES:
        raise FrameError(f"a frame of {length} bytes is longer than {LIMIT_BYTES}")
    _LENGTH.pack_into(buffer, 0, length)
    return bytes(buffer)


class FrameReader(Generic[M]):
    """Cuts a stream of bytes into messages, however the bytes were split on their way."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[list[M]]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[M]:
        """The messages that are whole now. Raises FrameError."""
        self._buffer += data
        messages: list[M] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > LIMIT_BYTES:
                raise FrameError(f"a frame claims {length} bytes, more than {LIMIT_BYTES}")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            body = bytes(memoryview(self._buffer)[start + _LENGTH.size : end])  # what is Raw keeps a reference to it
            try:
                messages += self._decoder.decode(body)
            except (msgspec.DecodeError, RecursionError) as error:
                raise FrameError(f"a frame cannot be read: {error}") from None
            start = end
        if start:
            del self._buffer[:start]
        return messages


def from_http_side() -> FrameReader[ToEngine]:
    """What a model process reads with."""
    return FrameReader(msgspec.msgpack.Decoder(list[ToEngine]))


def from_engines() -> FrameReader[FromEngine]:
    """What the HTTP side reads with."""
    return FrameReader(msgspec.msgpack.Decoder(list[FromEngine]))
