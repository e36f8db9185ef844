"""The form of a message between a worker and a server: a fixed head, a few plain words, raw numbers. Never code.

    head   magic, kind, dtype, form, worker, sequence, clock, bucket, bytes of words, bytes of data, token
    words  a JSON object, small
    data   elements of the dtype, little-endian

`decode` trusts nothing: every length is checked against the limits and against what came.
"""

import hmac
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from shoal.errors import ShoalError

MAGIC = b"SHPS\x01"
TOKEN_BYTES = 32
WORDS_LIMIT = 16 << 20  # bytes
DATA_LIMIT = 256 << 20  # bytes of one message's numbers
NO_TOKEN = bytes(TOKEN_BYTES)
_HEAD = struct.Struct(f"<5sBBBIQqIIQ{TOKEN_BYTES}s")
HEAD_BYTES = _HEAD.size
DTYPES = ("none", "float32", "float64", "float16", "bfloat16", "uint8", "int64", "int32", "int16", "int8", "bool")
SIZES = (1, 4, 8, 2, 2, 1, 8, 4, 2, 1, 1)


class Kind(IntEnum):
    setup = 1  # worker -> server: what is to be served
    put = 2  # a piece of the weights or of the optimiser's state
    join = 3
    leave = 4
    push = 5  # a bucket of a gradient
    commit = 6  # apply it
    pull = 7
    get = 8  # the optimiser's state
    retract = 9  # take back a push whose sum has been seen: the step is done again
    welcome = 20  # server -> worker
    summed = 21  # what the norm of a round needs
    weights = 22
    grant = 23  # the weights are all there: go on
    state = 24
    done = 25  # answers setup, the last put and get, leave
    refused = 26


class Form(IntEnum):
    """How the data of a push are written."""

    dense = 0
    rows = 1  # only runs of 64 bytes that are not zero, see rows.py
    compressed = 2  # as a compressor of shoal.comm.compression wrote it


class WireError(ShoalError):
    """A message that no worker of ours would send."""


@dataclass(frozen=True)
class Message:
    kind: Kind
    worker: int = 0
    clock: int = 0
    bucket: int = 0
    form: Form = Form.dense
    dtype: str = "none"
    words: Mapping[str, Any] = field(default_factory=dict)
    data: Any = b""  # bytes, or anything with the buffer protocol; contiguous


def encode(message: Message, sequence: int, token: bytes = NO_TOKEN) -> tuple[bytes, Any]:
    """(head and words, data)."""
    words = json.dumps(message.words, separators=(",", ":")).encode() if message.words else b""
    size = memoryview(message.data).nbytes
    head = _HEAD.pack(
        MAGIC,
        message.kind,
        DTYPES.index(message.dtype),
        message.form,
        message.worker,
        sequence,
        message.clock,
        message.bucket,
        len(words),
        size,
        token,
    )
    return head + words, message.data


def head_length(raw: memoryview) -> int:
    """Bytes of head and words of a message that lies in one run. Raises WireError."""
    if raw.nbytes < HEAD_BYTES:
        raise WireError(f"a head of {raw.nbytes} bytes")
    length = HEAD_BYTES + int(_HEAD.unpack_from(raw)[8])
    if length > raw.nbytes:
        raise WireError("words that end after the message")
    return length


def decode(head: Any, data: Any, token: bytes = NO_TOKEN) -> tuple[Message, int]:
    """(message, sequence). Raises WireError, and nothing else, for anything that `encode` does not make."""
    head = memoryview(head)
    if head.nbytes < HEAD_BYTES:
        raise WireError(f"a head of {head.nbytes} bytes")
    magic, kind, dtype, form, worker, sequence, clock, bucket, words_size, size, theirs = _HEAD.unpack_from(head)
    if magic != MAGIC:
        raise WireError("another protocol")
    if not hmac.compare_digest(theirs, token):
        raise WireError("a wrong token")
    if words_size > WORDS_LIMIT or head.nbytes != HEAD_BYTES + words_size:
        raise WireError(f"words of {head.nbytes - HEAD_BYTES} bytes where {words_size} were announced")
    data = memoryview(data)
    if size > DATA_LIMIT or data.nbytes != size:
        raise WireError(f"data of {data.nbytes} bytes where {size} were announced")
    if dtype >= len(DTYPES) or (size % SIZES[dtype]):
        raise WireError(f"{size} bytes of dtype {dtype}")
    try:
        return (
            Message(
                Kind(kind), worker, clock, bucket, Form(form), DTYPES[dtype], _words(bytes(head[HEAD_BYTES:])), data
            ),
            sequence,
        )
    except ValueError as error:  # also of JSON and of UTF-8
        raise WireError(str(error)) from None
    except RecursionError:
        raise WireError("words nested too deep") from None


def _words(raw: bytes) -> dict[str, Any]:
    if not raw:
        return {}
    words = json.loads(raw)
    if not isinstance(words, dict):
        raise WireError("words that are no object")
    return words


# --- words that are checked when they are read --------------------------------------------------------------------


def whole(words: Mapping[str, Any], name: str, least: int = 0, most: int = 1 << 62) -> int:
    value = words.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise WireError(f"{name} = {_shown(value)} is not a whole number of {least} to {most}")
    return value


def number(words: Mapping[str, Any], name: str) -> float:
    value = words.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WireError(f"{name} = {_shown(value)} is not a finite number")
    return float(value)


def wholes(words: Mapping[str, Any], name: str, *, length: int | None = None, most: int = 1 << 62) -> list[int]:
    value = words.get(name)
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise WireError(f"{name} is not a list{f' of {length}' if length is not None else ''}")
    return [whole({name: item}, name, 0, most) for item in value]


def text(words: Mapping[str, Any], name: str) -> str:
    value = words.get(name)
    if not isinstance(value, str) or len(value) > 200:
        raise WireError(f"{name} = {_shown(value)} is no name")
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 60 else shown[:60] + "..."
