"""What the lead worker tells every server before the first step, as plain values."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shoal.comm.layout import Layout, flat_layout
from shoal.comm.server import wire
from shoal.comm.server.cuts import Part, Piece, parts, pieces
from shoal.comm.server.wire import WireError

if TYPE_CHECKING:
    import torch

_MOST_ELEMENTS = 1 << 40
_FLAT = ("float32", "float64")


@dataclass(frozen=True)
class Setup:
    scheme: str  # "synchronous", "stale"
    bound: int | None  # stale: steps ahead of the slowest; None: asynchronous
    expected: int  # workers 0 .. expected - 1 are waited for from the start
    servers: int
    gradients: tuple[int, ...]  # elements of each parameter, in flat order
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]  # of each parameter
    state: tuple[int, ...]  # elements of each buffer; synchronous only
    workers: int  # that the layout's buckets are cut for
    bucket_elements: int
    dtype: str  # of the flat gradient
    leaves: int  # of the reduction tree
    ownership: tuple[tuple[int, int], ...]  # leaves of each worker; (): one operand a worker, as they joined
    partials: tuple[int, ...]  # most partial sums of each worker
    facts: int  # numbers in a worker's row
    whole: bool  # tensors are not cut
    optimizer: str
    defaults: Mapping[str, Any]
    groups: tuple[Mapping[str, Any], ...]
    members: tuple[tuple[int, ...], ...]  # slots of each group

    @property
    def synchronous(self) -> bool:
        return self.scheme == "synchronous"

    @cached_property
    def layout(self) -> Layout:
        return flat_layout(self.gradients, self.state, self.workers, self.bucket_elements)

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        return pieces(self.layout, len(self.gradients), self.servers, whole=self.whole, state=self.synchronous)

    def parts(self, server: int) -> tuple[Part, ...]:
        """The parameters' runs that a server updates."""
        return parts(self.layout, self.pieces[server], range(len(self.gradients)))

    @cached_property
    def flat_dtype(self) -> "torch.dtype":
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def to_words(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in self.__annotations__}))
        return plain

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.to_words(), sort_keys=True).encode()).hexdigest()

    @staticmethod
    def from_words(words: Mapping[str, Any]) -> "Setup":
        """Raises WireError for anything that makes no sense."""
        if set(words) != set(Setup.__annotations__):
            raise WireError("a setup with other keys")
        gradients = wire.wholes(words, "gradients", most=_MOST_ELEMENTS)
        servers = wire.whole(words, "servers", 1, 1 << 16)
        expected = wire.whole(words, "expected", 0, 1 << 16)
        leaves = wire.whole(words, "leaves", 1, 1 << 20)
        dtypes = tuple(_one_of(value, wire.DTYPES[1:], "dtype") for value in _list(words, "dtypes", len(gradients)))
        ownership = tuple(_pair(value, leaves) for value in _list(words, "ownership"))
        if ownership and len(ownership) != expected:
            raise WireError(f"an ownership of {len(ownership)} workers where {expected} are expected")
        partials = wire.wholes(words, "partials", length=expected, most=64)
        groups = tuple(_options(group) for group in _list(words, "groups"))
        members = tuple(
            tuple(wire.wholes({"members": own}, "members", most=len(gradients) - 1))
            for own in _list(words, "members", len(groups))
        )
        flat = sorted(slot for own in members for slot in own)
        if flat != sorted(set(flat)):
            raise WireError("a parameter in two groups")
        shapes = tuple(tuple(wire.wholes({"shape": s}, "shape")) for s in _list(words, "shapes", len(gradients)))
        if any(_size(shape) != size for shape, size in zip(shapes, gradients, strict=True)):
            raise WireError("a shape that is not of its parameter's size")
        bound = words["bound"]
        return Setup(
            scheme=_one_of(words["scheme"], ("synchronous", "stale"), "scheme"),
            bound=None if bound is None else wire.whole(words, "bound"),
            expected=expected,
            servers=servers,
            gradients=tuple(gradients),
            shapes=shapes,
            dtypes=dtypes,
            state=tuple(wire.wholes(words, "state", most=_MOST_ELEMENTS)),
            workers=wire.whole(words, "workers", 1, 1 << 16),
            bucket_elements=wire.whole(words, "bucket_elements", 0, _MOST_ELEMENTS),
            dtype=_one_of(words["dtype"], _FLAT, "dtype"),
            leaves=leaves,
            ownership=ownership,
            partials=tuple(partials),
            facts=wire.whole(words, "facts", 0, 1 << 26),
            whole=words["whole"] is True,
            optimizer=wire.text(words, "optimizer"),
            defaults=_options(words["defaults"]),
            groups=groups,
            members=members,
        )


def _list(words: Mapping[str, Any], name: str, length: int | None = None) -> list[Any]:
    value = words.get(name)
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise WireError(f"{name} is not a list{f' of {length}' if length is not None else ''}")
    return value


def _one_of(value: Any, known: Sequence[str], what: str) -> str:
    if value not in known:
        raise WireError(f"{what} {value!r:.60} is none of {', '.join(known)}")
    return str(value)


def _pair(value: Any, leaves: int) -> tuple[int, int]:
    start, stop = wire.wholes({"ownership": value}, "ownership", length=2, most=leaves)
    return start, stop


def _options(value: Any) -> dict[str, Any]:
    """Plain values only: numbers, names, lists of numbers, one-element tensors."""
    if not isinstance(value, dict):
        raise WireError("options that are no object")
    for name, option in value.items():
        items = option if isinstance(option, list) else [option.get("tensor")] if isinstance(option, dict) else [option]
        if not all(isinstance(item, bool | int | float | str | None) for item in items):
            raise WireError(f"option {name!r:.60} is not plain")
    return value


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
