"""Optimiser states in 8 bits a value: block-wise, with dynamic tree quantisation (Dettmers et al., 2022).

A block of 256 values is divided by its largest magnitude, and each is written as the number of the nearest of 256
fixed values in [-1, 1] (or [0, 1], for what is never negative). These lie closest around zero, over seven decades: of
the 8 bits, leading zeros count the decade and the rest divides it evenly, so that a large value has more digits and
a small one is not lost. Plain functions of tensors, on any device; the same input gives the same bytes, in C++ too.

Beyond the paper: what is never negative, and not zero, never becomes zero. Second moments are divided by: one that is
lost to zero, while its first moment is not, would throw a parameter far away (Li, Chen and Zhu, 2023, for 4 bits).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from shoal.memory import fused

BLOCK = 256  # values that share one scale
DECADES = 7


@cache
def values_of(signed: bool) -> Tensor:
    """The 256 values that a code can stand for, in ascending order: float32 [256].

    Decade e of 7 reaches from 10^(e-7) to 10^(e-6) in equal cells, each told by its middle: 2^e cells for either sign,
    or 2^(e+1) where no sign is needed; then 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        cells = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, cells + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - DECADES + 1)).tolist()
        found += middles
        if signed:
            found += [-middle for middle in middles]
    return torch.tensor(sorted(found), dtype=torch.float64).float()


@dataclass(frozen=True)
class _Tables:
    values: Tensor  # float32 [256]
    codes: Tensor  # uint8 [65536]: by a number's upper 16 bits, the code of the least number that has them
    edges: Tensor  # float32 [65536]: numbers with these bits from which on the code is one more; infinite for none


@cache
def _tables(signed: bool, device: torch.device) -> _Tables:
    """So that the nearest of 256 is found by two look-ups in place of eight comparisons.

    Sixteen bits of a float32 leave cells so narrow that at most one edge between two codes lies in each."""
    values = values_of(signed)
    edges = (values[1:] + values[:-1]) / 2
    words = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([words, words + 0xFFFF]).view(torch.float32)
    ends = torch.where(ends.abs() < 1.01, ends, torch.zeros_like(ends))  # no others come: the largest is 1
    least, most = torch.bucketize(ends.amin(0), edges), torch.bucketize(ends.amax(0), edges)
    beyond = torch.full((1,), torch.inf)
    edge = torch.where(most > least, torch.cat([edges, beyond])[least], beyond)
    return _Tables(values.to(device), least.to(torch.uint8).to(device), edge.to(device))


def blocks_of(elements: int) -> int:
    return -(-elements // BLOCK)


def encode(values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Write finite ``values`` (float32 [n]) as ``codes`` (uint8 [n]) and ``scales`` (float32 [blocks of n]).

    A value halfway between two becomes the lower one. Values of an unsigned kind must not be negative; of these, what
    is above zero becomes the smallest code above zero at least."""
    if fused.usable(values, codes, scales):
        tables = _tables(signed, values.device)
        fused.encode(values, codes, scales, tables.codes, tables.edges, signed=signed)
    else:
        encode_in_torch(values, codes, scales, signed=signed)


def encode_in_torch(values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """As `encode`, on any device and without a compiler."""
    count, whole = len(values), len(values) // BLOCK * BLOCK
    if whole:
        _encode(values[:whole].view(-1, BLOCK), codes[:whole].view(-1, BLOCK), scales[: whole // BLOCK], signed)
    if whole < count:
        _encode(values[whole:].view(1, -1), codes[whole:].view(1, -1), scales[whole // BLOCK :], signed)


def _encode(values: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None:
    tables = _tables(signed, values.device)
    torch.amax(values.abs(), 1, out=scales)
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    shares = values / divisors.unsqueeze(1)
    upper = (shares.view(torch.int32) >> 16).bitwise_and_(0xFFFF).view(-1)
    above = shares.view(-1) > torch.index_select(tables.edges, 0, upper)
    torch.add(torch.index_select(tables.codes, 0, upper).view_as(codes), above.view_as(codes), out=codes)
    if not signed:
        torch.maximum(codes, (shares > 0).view(torch.uint8), out=codes)


def decode(codes: Tensor, scales: Tensor, into: Tensor, *, signed: bool) -> Tensor:
    """The values again, written into ``into`` (float32 [n]), which is returned."""
    if not fused.usable(codes, scales, into):
        return decode_in_torch(codes, scales, into, signed=signed)
    fused.decode(codes, scales, _tables(signed, codes.device).values, into)
    return into


def decode_in_torch(codes: Tensor, scales: Tensor, into: Tensor, *, signed: bool) -> Tensor:
    """As `decode`, on any device and without a compiler."""
    table = _tables(signed, codes.device).values
    torch.index_select(table, 0, codes.view(-1).int(), out=into)
    whole = len(into) // BLOCK * BLOCK
    into[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK].unsqueeze(1))
    if whole < len(into):
        into[whole:].mul_(scales[whole // BLOCK])
    return into
