"""Axes: from values to places between 0 and 1, with ticks at round numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_MOST = 1e290  # larger values lie outside of every scale, or the arithmetic on its ends would overflow


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``, beyond them outside; zero and less lie far below the end of a log scale."""
        if self.log:
            value = max(value, self.low * 1e-3)
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def _round_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 2.5, 5 x 10^n that covers ``span`` in at most ``count`` steps."""
    rough = span / count
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(unit * factor for factor in (1, 2, 2.5, 5, 10, 20) if unit * factor >= rough * (1 - 1e-9))


def linear(values: Iterable[float], count: int = 5, zero: bool = False) -> Scale:
    """A scale from round number to round number around the finite values; from 0 with ``zero``."""
    finite = [min(max(value, -_MOST), _MOST) for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1 / _MOST):  # one value: room above and below it
        pad = abs(high) / 2 if abs(high) > 1 / _MOST else 1.0
        low, high = low if zero and low == 0 else low - pad, high + pad
    step = _round_step(high - low, count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def steps(values: Iterable[float], count: int = 6, whole: bool = True) -> Scale:
    """A scale for x: its ends are the data's own, and the ticks inside are round (whole numbers with ``whole``)."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = _round_step(high - low, count)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale(low, high, tuple(float(f"{number * step:.12g}") for number in range(first, last + 1)))


def times(values: Iterable[float], count: int = 6) -> tuple[Scale, list[str]]:
    """A scale for x in seconds, and the texts of its ticks: round in seconds, minutes or hours, whichever fits."""
    finite = [value for value in values if math.isfinite(value)]
    unit, name = next(
        ((u, n) for u, n in ((3600.0, "h"), (60.0, "min")) if max(finite, default=0.0) >= 2 * u), (1.0, "s")
    )
    across = steps([value / unit for value in finite], count, whole=False)
    scaled = Scale(across.low * unit, across.high * unit, tuple(tick * unit for tick in across.ticks))
    return scaled, [f"{tick:g} {name}" for tick in across.ticks]


def logarithmic(values: Iterable[float]) -> Scale | None:
    """A scale over the positive finite values, ticks at 1, 2 and 5 or at powers of ten; None without such values.

    It spans twelve decades at most, below the largest value: a single tiny value would press all others together."""
    positive = [min(value, _MOST) for value in values if math.isfinite(value) and value >= 1 / _MOST]
    if not positive:
        return None
    high = max(positive)
    low = max(min(positive), high / 1e12)
    if high < low * 1.25:
        low, high = low / 1.25, high * 1.25
    decades = math.log10(high / low)
    factors: tuple[float, ...] = (1.0,)
    if decades < 1:
        factors = (1, 1.5, 2, 3, 4, 5, 6, 8)
    elif decades < 3:
        factors = (1, 2, 5)
    every = max(1, math.ceil(decades / 6))
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = [float(f"{f * 10.0**p:.6g}") for p in powers if len(factors) > 1 or p % every == 0 for f in factors]
    return Scale(low / 1.05, high * 1.05, tuple(mark for mark in marks if low / 1.05 <= mark <= high * 1.05), log=True)
