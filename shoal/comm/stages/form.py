"""The form of what one stage hands another: plain words that say what there is, and the memory of the tensors.

Nothing is fixed beforehand: the words travel with every message. A tensor keeps its strides, and where it starts within
64 bytes: kernels choose their way by both, and the next stage is to get the bits of one process. Never code.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.comm.layout import ALIGNMENT
from shoal.errors import UserError

_LINE = ALIGNMENT * 4  # bytes: what torch's memory starts at
_MOST_GAPS = 4  # times its elements that a tensor's region may hold before the tensor is made dense


@dataclass(frozen=True)
class View:
    """How a tensor lies in a flat region of memory."""

    dtype: str  # as torch prints it, without "torch."
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # elements from the region's start
    elements: int  # of the region
    wants_gradient: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def nbytes(self) -> int:
        return self.elements * self.torch_dtype.itemsize

    def of(self, region: Tensor) -> Tensor:
        """The tensor in a flat region [elements] of its dtype."""
        found = region.as_strided(self.shape, self.strides, self.offset + region.storage_offset())
        return found.requires_grad_(self.wants_gradient)


def viewed(tensor: Tensor, name: str) -> tuple[View, Tensor]:
    """How a tensor lies, and the flat region [elements], from a cache line's start, that holds it."""
    if tensor.layout != torch.strided or tensor.is_meta:
        raise UserError(
            f"value {name!r} of a stage is a {tensor.layout} tensor on {tensor.device}: make it dense first."
        )
    wants = tensor.requires_grad
    dense = tensor.detach().resolve_conj().resolve_neg()
    span = 1 + sum((size - 1) * stride for size, stride in zip(dense.shape, dense.stride(), strict=True))
    if dense.numel() == 0:
        span = 0
    elif span > _MOST_GAPS * dense.numel():
        dense, span = dense.contiguous(), dense.numel()
    before = 0 if span == 0 else dense.data_ptr() % _LINE // dense.element_size()
    if before > dense.storage_offset():  # memory that somebody else made, with a start of its own
        dense, before = dense.clone(), 0
    region = dense.as_strided((span + before,) if span else (0,), (1,), dense.storage_offset() - before)
    dtype = str(dense.dtype).removeprefix("torch.")
    return View(dtype, tuple(dense.shape), dense.stride(), before, len(region), wants), region


@dataclass(frozen=True)
class Packed:
    words: Any  # of JSON: the values, with numbers of tensors in the place of tensors
    views: tuple[View, ...]
    regions: tuple[Tensor, ...]


def pack(values: Mapping[str, Any]) -> Packed:
    """Raises UserError for a value that is no tensor, number, text or None, and no tuple, list or dict of them."""
    views: list[View] = []
    regions: list[Tensor] = []
    words = [[name, _words(value, name, views, regions)] for name, value in values.items()]
    return Packed(words, tuple(views), tuple(regions))


# A function within `pack` that calls itself would be a circle of references: tensors would live until it is collected.
def _words(value: Any, name: str, views: list[View], regions: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        view, region = viewed(value, name)
        views.append(view)
        regions.append(region)
        return {"t": len(views) - 1}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (tuple, torch.Size):
        return {"u": [_words(item, name, views, regions) for item in value]}
    if type(value) is list:
        return {"l": [_words(item, name, views, regions) for item in value]}
    if type(value) is dict:
        pairs = value.items()
        return {"d": [[_words(key, name, views, regions), _words(item, name, views, regions)] for key, item in pairs]}
    if type(value).__module__ == "torch.return_types":
        return {"r": [type(value).__name__, [_words(item, name, views, regions) for item in value]]}
    raise UserError(
        f"value {name!r} of a stage is a {type(value).__name__}: stages hand on tensors, numbers, text, None, "
        f"and tuples, lists and dicts of them; cut the model elsewhere."
    )


def unpack(words: Any, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The inverse of `pack`, for tensors in the order of its views."""
    return {name: _value(word, tensors) for name, word in words}


def _value(word: Any, tensors: Sequence[Tensor]) -> Any:
    if not isinstance(word, dict):
        return word
    ((kind, inner),) = word.items()
    if kind == "t":
        return tensors[inner]
    if kind == "d":
        return {_value(key, tensors): _value(item, tensors) for key, item in inner}
    if kind == "r":
        return getattr(torch.return_types, inner[0])([_value(item, tensors) for item in inner[1]])
    items = [_value(item, tensors) for item in inner]
    return tuple(items) if kind == "u" else items


Place = tuple[int, int] | None  # whose arena, and where in it in bytes; None: the bytes come with the message


@dataclass(frozen=True)
class Head:
    """All of a message but the memory."""

    key: tuple[int, ...]  # which message it is
    words: Any
    views: tuple[View, ...]
    places: tuple[Place, ...]

    def encode(self) -> bytes:
        views = [
            [v.dtype, v.shape, v.strides, v.offset, v.elements, v.wants_gradient, place]
            for v, place in zip(self.views, self.places, strict=True)
        ]
        return json.dumps([self.key, self.words, views], separators=(",", ":")).encode()

    @staticmethod
    def decode(data: bytes | bytearray | memoryview) -> "Head":
        key, words, rows = json.loads(bytes(data))
        views = tuple(View(d, tuple(shape), tuple(strides), *rest) for d, shape, strides, *rest, _ in rows)
        places = tuple(None if row[-1] is None else (row[-1][0], row[-1][1]) for row in rows)
        return Head(tuple(key), words, views, places)


def raw(region: Tensor) -> Tensor:
    """The bytes of a flat region, uint8 [n], in the same memory."""
    return region.view(torch.uint8) if region.numel() else region.new_empty(0, dtype=torch.uint8)


def region_of(view: View, data: memoryview) -> Tensor:
    """A region in memory of its own, of the first bytes of ``data``."""
    region = torch.empty(view.elements, dtype=view.torch_dtype)
    if view.elements:
        raw(region).numpy().data[:] = data[: view.nbytes]
    return region
