"""bfloat16 in the place of float32: rounded at random, or with the other 16 bits kept beside it.

Random numbers come from a counter, not from a generator that remembers: those of an element depend on a key and its
index alone, so any part of a tensor can be rounded anywhere, in any order, to the same bits.
"""

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def stream_key(seed: int, step: int, name: str) -> int:
    """64 bits that name the stream of one parameter's update."""
    words = f"shoal/round/{seed}/{step}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest())


def random_halves(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements from ``start`` on: int16 [count].

    Each two elements share a 32-bit word: their pair's number, mixed with both halves of the key by the steps of
    MurmurHash3's finaliser (Appleby, 2011), twice."""
    first, last = start // 2, -(-(start + count) // 2)
    words = torch.arange(_wrapped(first), _wrapped(first) + last - first, device=device, dtype=torch.int64)
    words = words.to(torch.int32)
    for half in (key & _MASK, key >> 32):
        words.bitwise_xor_(_signed(half))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            words.bitwise_xor_((words >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_signed(factor))
        words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))
    return words.view(torch.int16)[start - 2 * first :][:count]


def _wrapped(word: int) -> int:
    return word & 0x7FFFFFFF


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def round_at_random(values: Tensor, key: int, start: int = 0) -> Tensor:
    """bfloat16 [n] of float32 [n]: one of the two neighbours, the nearer the likelier, so that the mean is the value.

    ``start``: the index of the first one in its parameter. What bfloat16 holds exactly stays what it is."""
    drawn = random_halves(key, start, values.numel(), values.device).int().bitwise_and_(0xFFFF)
    words = drawn.add_(values.view(torch.int32)) >> 16
    return words.to(torch.int16).view(torch.bfloat16)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16 [n], int16 [n]) of float32 [n]: the nearest bfloat16, and what takes it back to the very float32.

    A value halfway goes away from zero: then 16 bits are enough for what is left."""
    words = values.view(torch.int32)
    upper = (words + 0x8000) >> 16
    rest = words - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), rest.to(torch.int16)


def joined(upper: Tensor, rest: Tensor, into: Tensor | None = None) -> Tensor:
    """The float32 that ``split`` took apart."""
    words = (upper.view(torch.int16).int() << 16).add_(rest)
    if into is None:
        return words.view(torch.float32)
    return into.copy_(words.view(torch.float32))
