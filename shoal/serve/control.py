"""What the HTTP side and the parent of the model processes say to each other, over a socket pair of their own."""

import struct
from collections.abc import Mapping
from typing import Any

import msgspec

LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, tag="start", frozen=True):
    """The parent's first message: what to load."""

    target: str
    task: str
    dtype: str
    name: str
    options: Mapping[str, Any]  # what engines are told
    path: tuple[str, ...]  # sys.path, so that a user's own modules are found


class Fork(msgspec.Struct, tag="fork", frozen=True):
    """One more model process. Its end of the link travels with the message (SCM_RIGHTS)."""

    number: int


class Kill(msgspec.Struct, tag="kill", frozen=True):
    number: int


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is loaded. ``seconds`` of the parts of the start."""

    facts: Mapping[str, Any]
    seconds: Mapping[str, float]
    weights_bytes: int


class Broken(msgspec.Struct, tag="broken", frozen=True):
    """It cannot be loaded, in one line."""

    why: str
    user_error: bool


class Forked(msgspec.Struct, tag="forked", frozen=True):
    number: int
    pid: int


class Gone(msgspec.Struct, tag="gone", frozen=True):
    number: int
    status: int  # as os.waitstatus_to_exitcode says: negative: the signal


ToParent = Start | Fork | Kill
FromParent = Ready | Broken | Forked | Gone
encode = msgspec.msgpack.Encoder().encode


def frame(message: ToParent | FromParent) -> bytes:
    body = encode(message)
    return LENGTH.pack(len(body)) + body


class ControlReader:
    """Bytes to messages; ours alone write to this socket, so that a fault in a frame may raise."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        self._buffer += data
        messages = []
        while len(self._buffer) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(bytes(self._buffer[LENGTH.size : end])))
            del self._buffer[:end]
        return messages
