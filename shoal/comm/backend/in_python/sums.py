"""Reductions of whole tensors in the order of the ranks, for every type that torch.distributed reduces."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

NAMES = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.PRODUCT: "product",
    dist.ReduceOp.MIN: "min",
    dist.ReduceOp.MAX: "max",
    dist.ReduceOp.BAND: "band",
    dist.ReduceOp.BOR: "bor",
    dist.ReduceOp.BXOR: "bxor",
}
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
_SIGNED = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}  # torch adds up few of these
_PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
_OF_BOOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.logical_or,
    "max": torch.logical_or,
    "bor": torch.logical_or,
    "product": torch.logical_and,
    "min": torch.logical_and,
    "band": torch.logical_and,
    "bxor": torch.logical_xor,
}


def name_of(op: object) -> str:
    """ "sum"; "another reduction" for those of torch that work on accelerators only."""
    kind = getattr(op, "op", op)
    return next((name for known, name in NAMES.items() if known == kind), "another reduction")


def can_reduce(dtype: torch.dtype, name: str) -> bool:
    if dtype == torch.bool:
        return name in _OF_BOOLS
    if dtype.is_complex:
        return name in ("sum", "avg", "product")
    if dtype.is_floating_point:
        return dtype.itemsize > 1 and name in ("sum", "avg", "product", "min", "max")
    return name in _PAIRS and name != "avg"


def combine(parts: Sequence[Tensor], out: Tensor, name: str) -> None:
    """((0 . 1) . 2) . ...; floats of 16 bits are reduced in 32 and rounded once. ``out`` may be one of the parts."""
    signed = _SIGNED.get(out.dtype)
    if signed is not None:
        lowest = torch.iinfo(signed).min if name in ("min", "max") else 0  # orders unsigned numbers as signed ones
        total = reduce(_PAIRS[name], [part.view(signed) ^ lowest for part in parts])
        torch.bitwise_xor(total, lowest, out=out.view(signed))
        return
    wide = _WIDE.get(out.dtype)
    pair = (_OF_BOOLS if out.dtype == torch.bool else _PAIRS)[name]
    if wide is None and len(parts) == 2 and name != "avg":
        pair(*parts, out=out)  # type: ignore[call-arg]
        return
    total = parts[0].to(wide) if wide is not None else parts[0]
    for part in parts[1:]:
        total = pair(total, part.to(wide) if wide is not None else part)
    if name == "avg":
        total = _divided(total, len(parts))
    out.copy_(total)


def _divided(total: Tensor, count: int) -> Tensor:
    """Part by part: torch's division of complex numbers by whole ones is off by a bit."""
    return torch.view_as_complex(torch.view_as_real(total) / count) if total.is_complex() else total / count
