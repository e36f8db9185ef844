"""Random values that are a function of a key and a place alone: any run of them is drawn without those before it.

The words come from Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), which is a function of
a counter. What is made of them uses additions, multiplications, roots and bits only, which every processor rounds
alike, so that the values are the same bits on all of them."""

import hashlib

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CHUNK = 1 << 16  # values at a time: what is computed stays in a processor's cache
_WORDS = 8  # of 32 bits that one count of the counter gives
_LOG = (  # log(1 + f) / f for f from sqrt(1/2) - 1 to sqrt(2) - 1, within 3.1e-8: Chebyshev's points, as the others
    0.9999999742674384,
    -0.49999987032284776,
    0.33334183338523043,
    -0.2500215346095456,
    0.19956977483076513,
    -0.16560695992065042,
    0.14949095476192523,
    -0.14377330567392343,
    0.08743945352062935,
)
_SINE = (3.1415926401307086, -5.167710083507897, 2.55007752321479, -0.5982912856222014, 0.07765766030996298)
_COSINE = (0.9999999532476084, -4.934792830619631, 4.058411352862426, -1.3318765680803262, 0.21968961109746754)
_LN2 = 0.6931471805599453


class CounterStream:
    """The values 0, 1, 2, ... that belong to ``name`` under ``seed``, float32. Value i is made of word i; of a normal
    one, of the words 2 (i // 2) and 2 (i // 2) + 1."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"shoal/initial/{seed}/{name}".encode(), digest_size=16).digest()
        self._philox = np.random.Philox(key=int.from_bytes(digest, "little"), counter=0)
        self._at = 0  # the count that comes next
        self._room = np.empty((5, CHUNK // 2), np.float32)
        self._bits = np.empty(CHUNK // 2, np.int32)

    def uniform(self, start: int, out: Floats) -> None:
        """Values from ``start`` on, evenly from -1 to 1, into ``out`` [n]."""
        for at in range(0, len(out), CHUNK):
            part = out[at : at + CHUNK]
            np.copyto(part, self._words(start + at, len(part)), casting="unsafe")
            np.multiply(part, np.float32(2**-31), out=part)

    def normal(self, start: int, out: Floats) -> None:
        """Values from ``start`` on, of mean 0 and variance 1, into ``out`` [n] (Box and Muller, 1958)."""
        if start % 2 and len(out):  # the second of a pair
            pair = np.empty(2, np.float32)
            self._pairs(start - 1, pair)
            out[0] = pair[1]
            start, out = start + 1, out[1:]
        even = len(out) // 2 * 2
        for at in range(0, even, CHUNK):
            self._pairs(start + at, out[at : min(at + CHUNK, even)])
        if even < len(out):
            pair = np.empty(2, np.float32)
            self._pairs(start + even, pair)
            out[even] = pair[0]

    def _words(self, start: int, count: int) -> NDArray[np.int32]:
        first = start // _WORDS
        last = -(-(start + count) // _WORDS)
        if first != self._at:
            self._philox.advance((first - self._at) % 2**256)
        raw = self._philox.random_raw((last - first) * _WORDS // 2)
        self._at = last
        skipped = start - first * _WORDS
        return raw.astype("<u8", copy=False).view("<i4")[skipped : skipped + count]

    def _pairs(self, start: int, out: Floats) -> None:
        words = self._words(start, len(out))
        radius, x, square, made, spare = (row[: len(out) // 2] for row in self._room)
        signs = spare
        np.copyto(signs, words[0::2], casting="unsafe")
        np.abs(signs, out=radius)
        np.multiply(radius, np.float32(2**-31), out=radius)
        np.maximum(radius, np.float32(2**-32), out=radius)
        _root_of_log(radius, self._bits[: len(radius)], x, made)
        np.copyto(x, words[1::2], casting="unsafe")
        np.multiply(x, np.float32(2**-32), out=x)  # half turns, from -1/2 to 1/2; the other half of them by sign
        np.multiply(x, x, out=square)
        _polynomial(_COSINE, square, made)
        np.multiply(made, radius, out=made)
        np.copysign(made, signs, out=out[0::2])
        _polynomial(_SINE, square, made)
        np.multiply(made, x, out=made)
        np.multiply(made, radius, out=out[1::2])


def _polynomial(coefficients: tuple[float, ...], x: Floats, out: Floats) -> None:
    out.fill(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        np.multiply(out, x, out=out)
        np.add(out, np.float32(coefficient), out=out)


def _root_of_log(u: Floats, bits: NDArray[np.int32], f: Floats, made: Floats) -> None:
    """sqrt(-2 log(u)) for u in (0, 1], in place: log(2^e (1 + f)) = e log(2) + log(1 + f)."""
    halved = np.int32(0x3F3504F3)  # sqrt(1/2) as bits
    own = u.view(np.int32)
    np.subtract(own, halved, out=bits)
    np.right_shift(bits, 23, out=bits)
    exponent = made
    np.copyto(exponent, bits, casting="unsafe")
    np.left_shift(bits, 23, out=bits)
    np.subtract(own, bits, out=own)
    np.subtract(u, np.float32(1), out=f)
    np.multiply(exponent, np.float32(_LN2), out=u)
    _polynomial(_LOG, f, made)
    np.multiply(made, f, out=made)
    np.add(u, made, out=u)
    np.multiply(u, np.float32(-2), out=u)
    np.maximum(u, np.float32(0), out=u)  # log(1) is 0 or a rounding away from it
    np.sqrt(u, out=u)
