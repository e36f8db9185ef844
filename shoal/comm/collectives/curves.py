"""Measured seconds by size: for what a backend does inside, which no program describes."""

from bisect import bisect_left
from dataclasses import dataclass

from shoal.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Curve:
    """``seconds(nbytes)`` is measured at some sizes, and on a straight line between them."""

    name: str  # of the backend ("gloo") or algorithm
    collective: str
    sizes: tuple[int, ...]  # bytes, rising
    values: tuple[float, ...]  # seconds, or a ratio of seconds
    ratio: bool = False  # beyond the last size: a ratio stays, seconds go on at the last rate

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or len(self.sizes) != len(self.values) or not rising or min(self.values) < 0:
            raise UserError(
                f"curve of {self.name} {self.collective}: it needs rising sizes, each with a value of 0 up."
            )

    def seconds(self, nbytes: int) -> float:
        sizes, values = self.sizes, self.values
        place = bisect_left(sizes, nbytes)
        if place == 0:
            return values[0]
        if place == len(sizes):
            if self.ratio:
                return values[-1]
            return values[-1] * nbytes / sizes[-1]
        a, b = sizes[place - 1], sizes[place]
        return values[place - 1] + (values[place] - values[place - 1]) * (nbytes - a) / (b - a)
