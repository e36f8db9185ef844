"""Where tensors stay from the forward pass to the backward pass that asks for them."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from shoal.errors import RunFailed
from shoal.memory.meter import Hold, Meter


class Kept(Protocol):
    def get(self) -> Tensor: ...


class Store(Protocol):
    meter: Meter
    moves: bool  # it takes tensors out of memory: worth handing it what autograd saves, too

    def keep(self, tensor: Tensor) -> Kept: ...


class Here:
    """They stay where they are."""

    moves = False

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def keep(self, tensor: Tensor) -> Hold:
        return self.meter.hold(tensor)


class _Stays:
    """A parameter or a buffer: it is looked up again, and must be what it was."""

    __slots__ = ("_name", "_tensor", "_version")

    def __init__(self, tensor: Tensor, name: str) -> None:
        self._tensor, self._version, self._name = tensor, tensor._version, name

    def get(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RunFailed(
                f"a parameter or buffer that block {self._name!r} needs for its backward pass was written to after "
                f"the forward pass."
            )
        return self._tensor


@contextlib.contextmanager
def saving_into(store: Store, name: str) -> Iterator[None]:
    """What autograd saves in a forward pass of block ``name`` goes to ``store``; nothing is computed again."""

    def pack(tensor: Tensor) -> Kept:
        return _Stays(tensor, name) if store.meter.ignores(tensor) else store.keep(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.get()):
        yield
