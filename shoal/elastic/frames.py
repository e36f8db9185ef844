"""What agents say to each other, as bytes: JSON of the few kinds of message that there are, checked field by field.

A message is [kind, field, field, ...]; nothing else is read, and nothing that is read can do more than be one of them.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

from shoal.elastic import consensus as c
from shoal.elastic import fleet as f
from shoal.elastic import membership as m
from shoal.elastic.council import Propose
from shoal.errors import ShoalError

LARGEST = 4 << 20  # bytes of a message
LONGEST_TEXT, LONGEST_ROW = 1 << 16, 1 << 12
_DEEPEST = 8


class FrameError(ShoalError):
    """A message that no agent of ours would send."""


@dataclasses.dataclass(frozen=True)
class Paced:
    """From the agent of rank 0: a step was committed, and took so long."""

    step: int
    seconds: float


KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *(c.AskVote, c.Vote, c.Append, c.Appended, c.Entry, c.Voters, c.Started, Propose, Paced),
        *(f.Up, f.Lost, f.Begin, f.Wished, f.Said, f.Forked, f.Made, f.Failed),
        *(m.Opened, m.Ready, m.Left, m.Went, m.Dead, m.Suspect, m.Drain, m.Done),
    )
}


def encode(message: Any) -> bytes:
    return json.dumps(plain(message), separators=(",", ":"), allow_nan=False).encode()


def decode(raw: bytes) -> Any:
    """Raises FrameError, and nothing else, for anything that `encode` does not make."""
    if len(raw) > LARGEST:
        raise FrameError(f"a message of {len(raw)} bytes; the limit is {LARGEST}")
    try:
        return read(json.loads(raw))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"no message: {str(error)[:100]}") from None


def plain(value: Any) -> Any:
    """Of a message or a field of one: what JSON can say."""
    if dataclasses.is_dataclass(value) and type(value).__name__ in KINDS:
        return [type(value).__name__, *(plain(getattr(value, field.name)) for field in dataclasses.fields(value))]
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return value[:LONGEST_TEXT]
    return value


def read(value: Any, depth: int = 0) -> Any:
    """The inverse of `plain` for a message. Raises FrameError."""
    if not isinstance(value, list) or not value or not isinstance(value[0], str) or value[0] not in KINDS:
        raise FrameError(f"no message: {str(value)[:100]}")
    kind = KINDS[value[0]]
    readers = _readers(value[0])
    if len(readers) != len(value) - 1 or depth > _DEEPEST:
        raise FrameError(f"{value[0]} with {len(value) - 1} fields instead of {len(readers)}")
    return kind(*(reader(item, depth + 1) for reader, item in zip(readers, value[1:], strict=True)))


Reader = Callable[[Any, int], Any]


@cache
def _readers(name: str) -> tuple[Reader, ...]:
    kind = KINDS[name]
    hints = typing.get_type_hints(kind)
    return tuple(_reader(hints[field.name]) for field in dataclasses.fields(kind))


def _reader(hint: Any) -> Reader:
    """Of a field, by its type."""
    if typing.get_origin(hint) is tuple:
        item = _reader(typing.get_args(hint)[0])

        def row(value: Any, depth: int) -> Any:
            if not isinstance(value, list) or len(value) > LONGEST_ROW:
                raise FrameError(f"no row: {str(value)[:100]}")
            return tuple(item(each, depth) for each in value)

        return row
    if typing.get_origin(hint) is types.UnionType:
        kinds = typing.get_args(hint)
        if type(None) in kinds:
            inner = _reader(next(kind for kind in kinds if kind is not type(None)))
            return lambda value, depth: None if value is None else inner(value, depth)
        return lambda value, depth: _one_of(kinds, read(value, depth))
    if hint in (bool, int, float, str):
        return lambda value, depth: _scalar(hint, value)
    return lambda value, depth: _one_of((hint,) if hint is not Any else tuple(KINDS.values()), read(value, depth))


def _scalar(kind: type[Any], value: Any) -> Any:
    if type(value) is int and abs(value) >= 1 << 63:
        raise FrameError("a number that is too large")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is str and len(value) > LONGEST_TEXT):
        raise FrameError(f"{str(value)[:100]} is no {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise FrameError(f"{value} is no number that can be counted with")
    return value


def _one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, kinds):
        raise FrameError(f"{type(value).__name__} in the wrong place")
    return value
