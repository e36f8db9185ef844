"""What the HTTP side and the parent of the model processes say to each other: frames over a socket pair of theirs."""

from collections.abc import Mapping
from typing import Any

import msgspec

from shoal.serve.frames import FrameReader


class Start(msgspec.Struct, tag="start", frozen=True):
    """The parent's first message: what to load."""

    target: str
    task: str
    dtype: str
    name: str
    mesh: Mapping[str, int]  # axis -> processes of a group; {}: whole models
    options: Mapping[str, Any]  # what engines are told
    path: tuple[str, ...]  # sys.path, so that a user's own modules are found


class Fork(msgspec.Struct, tag="fork", frozen=True):
    """One more model process, or group of them. Its end of the link travels with the message (SCM_RIGHTS)."""

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


class Gone(msgspec.Struct, tag="gone", frozen=True):
    """All processes of a group have ended: those that are left are killed when one has."""

    number: int
    status: int  # of the first one, as os.waitstatus_to_exitcode says: negative: the signal


ToParent = Start | Fork | Kill
FromParent = Ready | Broken | Gone


def to_parent() -> FrameReader[ToParent]:
    """What the parent reads with."""
    return FrameReader(msgspec.msgpack.Decoder(list[ToParent]))


def from_parent() -> FrameReader[FromParent]:
    """What the HTTP side reads with."""
    return FrameReader(msgspec.msgpack.Decoder(list[FromParent]))
