"""In which order the arms of a bench take turns."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

Arm = TypeVar("Arm")


def turns(arms: Sequence[Arm], rounds: int) -> Iterator[Arm]:
    """Every arm once a round, in an order that rotates: none is always the one after the same other."""
    for turn in range(rounds):
        shift = turn % len(arms)
        yield from (*arms[shift:], *arms[:shift])
