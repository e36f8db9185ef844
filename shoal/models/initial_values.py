"""First values of parameters and buffers: said by name, and drawn tensor by tensor, whole or any part of one.

A parameter's values depend on the seed, its name and the place of each in the whole tensor (`counter_streams`), so a
worker draws what it holds and nothing else, and gets what one process has there."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from shoal.models.counter_streams import CHUNK, CounterStream, Floats

Run = tuple[int, int]  # from, to
Kept = Mapping[int, Sequence[Run]]  # dim -> the places of it that are wanted, in order; of other dims: all

_CALL = 8192  # values that take as long to draw as it takes to begin somewhere else


@dataclass(frozen=True)
class Normal:
    std: float


@dataclass(frozen=True)
class Uniform:
    """From -bound to bound."""

    bound: float


@dataclass(frozen=True)
class Constant:
    value: float


Initial = Normal | Uniform | Constant


@runtime_checkable
class Initialised(Protocol):
    def initial_values(self) -> Mapping[str, Initial]:
        """Pattern (fnmatch) of tensors' names -> their first values; the first that fits counts.

        What none fits has that of its layer in PyTorch, of those in `usual`."""


def usual(module: nn.Module, key: str) -> Initial | None:
    """What PyTorch gives the tensor ``key`` of a layer, for the layers of the built-in models; None for others."""
    if isinstance(module, nn.Linear):
        return Uniform(module.in_features**-0.5)
    if isinstance(module, nn.Conv2d):
        return Uniform(fan_in(module) ** -0.5)
    if isinstance(module, nn.Embedding):
        return Normal(1.0)
    if isinstance(module, nn.LSTM):
        return Uniform(module.hidden_size**-0.5)
    if isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return Constant(1.0 if key in ("weight", "running_var") else 0.0)
    return None


def fan_in(module: nn.Conv2d | nn.Linear) -> int:
    """Values that go into one output."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.in_channels // module.groups * math.prod(module.kernel_size)


def initial_values(model: nn.Module) -> dict[str, Initial]:
    """Of every parameter and buffer of a model that says them, tied ones under their first name.

    Raises LookupError for one that neither the model nor its layer says."""
    said = model.initial_values() if isinstance(model, Initialised) else {}
    found: dict[str, Initial] = {}
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        path, _, key = name.rpartition(".")
        fits = [value for pattern, value in said.items() if fnmatchcase(name, pattern)]
        value = fits[0] if fits else usual(model.get_submodule(path), key)
        if value is None:
            raise LookupError(f"{type(model).__name__} does not say the first values of {name}")
        found[name] = value
    return found


_told: list[Callable[[nn.Module], None]] = []


@contextmanager
def watching(tell: Callable[[nn.Module], None]) -> Iterator[None]:
    """Within the block, ``tell`` gets each model that `initialise` is called with."""
    _told.append(tell)
    try:
        yield
    finally:
        _told.remove(tell)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Give every tensor of a model that says them its first values, under torch's seed (``torch.manual_seed``).

    For the end of a model's constructor. On the meta device nothing is done."""
    values = initial_values(model)
    for tell in _told:
        tell(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_meta:
            tensor.copy_(draw(values[name], torch.initial_seed(), name, tensor.shape))


def draw(
    initial: Initial,
    seed: int,
    name: str,
    shape: Sequence[int],
    kept: Kept | None = None,
    *,
    empty: Callable[[Sequence[int]], Tensor] = lambda sizes: torch.empty(sizes, device="cpu"),
) -> Tensor:
    """The first values of a tensor of this name and whole ``shape``, float32; of those places alone that are kept.

    ``empty`` gives the memory, on the processor whatever the default is: a factory may be asked for its outline."""
    kept = kept or {}
    sizes = [sum(b - a for a, b in kept[dim]) if dim in kept else size for dim, size in enumerate(shape)]
    out = empty(sizes)
    if isinstance(initial, Constant):
        return out.fill_(initial.value)
    if out.numel():
        flat = out.numpy().reshape(-1)
        _fill(_Values(initial, seed, name), flat, tuple(shape), kept)
    return out


class _Values:
    def __init__(self, initial: Normal | Uniform, seed: int, name: str) -> None:
        self._stream = CounterStream(seed, name)
        self._normal = isinstance(initial, Normal)
        self._scale = np.float32(initial.std if isinstance(initial, Normal) else initial.bound)

    def into(self, start: int, out: Floats) -> None:
        """Those from ``start`` on, in the whole tensor's order."""
        for at in range(0, len(out), CHUNK):
            part = out[at : at + CHUNK]
            (self._stream.normal if self._normal else self._stream.uniform)(start + at, part)
            np.multiply(part, self._scale, out=part)


def _fill(values: _Values, out: Floats, shape: tuple[int, ...], kept: Kept) -> None:
    if not kept:
        values.into(0, out)
        return
    last = max(kept)
    inner = math.prod(shape[last + 1 :])
    length = shape[last] * inner
    runs = [(a * inner, b * inner) for a, b in kept[last] if b > a]
    rows = np.arange(math.prod(shape[:last])).reshape(shape[:last])
    for dim in sorted(kept)[:-1]:
        rows = np.concatenate([rows.take(range(a, b), axis=dim) for a, b in kept[dim]], axis=dim)
    table = out.reshape(rows.size, -1)
    if length - table.shape[1] > _CALL * len(runs):
        for row, number in zip(table, rows.flat, strict=True):
            at = 0
            for a, b in runs:
                values.into(int(number) * length + a, row[at : at + b - a])
                at += b - a
        return
    at_once = max(1, CHUNK // length)
    starts = np.flatnonzero(np.diff(rows.reshape(-1), prepend=-2) != 1)
    for first, stop in zip(starts, (*starts[1:], rows.size), strict=True):  # rows that follow each other
        for begin in range(first, stop, at_once):
            part = table[begin : min(begin + at_once, stop)]
            whole = np.empty((len(part), length), np.float32)
            values.into(int(rows.flat[begin]) * length, whole.reshape(-1))
            at = 0
            for a, b in runs:
                part[:, at : at + b - a] = whole[:, a:b]
                at += b - a
