"""How two sets of tensors differ, bit for bit. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.train.weights import flat_bytes

_BLOCK = 1 << 20  # elements compared at a time, so that the comparison needs no copy of a whole tensor


@dataclass(frozen=True)
class Changed:
    """A tensor of the same shape and dtype on both sides whose bits differ."""

    name: str
    max_abs: float  # largest |a - b|, in float64; nan where only one side is not a number; 0.0 for -0.0 against 0.0
    elements: int  # that differ
    of: int


@dataclass(frozen=True)
class Difference:
    """All names in name order."""

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    unlike: tuple[tuple[str, str, str], ...]  # (name, "float32 [2, 3]" in the first, the same in the second)
    changed: tuple[Changed, ...]
    equal: int  # number of tensors with the same bits

    @property
    def first(self) -> str | None:
        """The first name, in name order, that is not the same on both sides."""
        others = (name for name, _, _ in self.unlike)
        changed = (c.name for c in self.changed)
        return min((*self.only_first, *self.only_second, *others, *changed), default=None)

    @property
    def max_abs(self) -> float:
        """Over all changed tensors; nan when one of them is. Tensors that are not on both sides do not count."""
        return max((c.max_abs for c in self.changed), key=lambda x: math.inf if math.isnan(x) else x, default=0.0)


def compare(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Difference:
    """The two sets side by side; equal means the same names, shapes, dtypes and bits (a NaN equals its own bits)."""
    unlike: list[tuple[str, str, str]] = []
    changed: list[Changed] = []
    both = sorted(first.keys() & second.keys())
    for name in both:
        a, b = first[name], second[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            unlike.append((name, describe(a), describe(b)))
        elif found := _changed(name, a, b):
            changed.append(found)
    return Difference(
        only_first=tuple(sorted(first.keys() - second.keys())),
        only_second=tuple(sorted(second.keys() - first.keys())),
        unlike=tuple(unlike),
        changed=tuple(changed),
        equal=len(both) - len(unlike) - len(changed),
    )


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def norm(tensor: Tensor) -> float:
    """Euclidean norm, summed in float64."""
    blocks = [torch.linalg.vector_norm(_wide(block)).item() for block in _blocks(tensor)]
    return math.hypot(*blocks)


def _changed(name: str, a: Tensor, b: Tensor) -> Changed | None:
    elements, worst = 0, torch.zeros((), dtype=torch.float64)
    for x, y in zip(_blocks(a), _blocks(b), strict=True):
        differs = (_bits(x) != _bits(y)).any(dim=1)
        if differs.any():
            elements += int(differs.sum())
            worst = torch.maximum(worst, (_wide(x[differs]) - _wide(y[differs])).abs().max())
    return Changed(name, worst.item(), elements, a.numel()) if elements else None


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.detach().cpu().reshape(-1), _BLOCK) if tensor.numel() else ()


def _bits(block: Tensor) -> Tensor:
    return flat_bytes(block.contiguous()).view(len(block), -1)


def _wide(block: Tensor) -> Tensor:
    return block.to(torch.complex128 if block.is_complex() else torch.float64)
