"""Which ways of keeping activations are worth trying under a budget, the cheapest first.

They depend on the table alone, the table on shapes alone, and the first one that fits is taken. So a smaller budget
never leads to a larger peak: either the same choice still fits; or its peak was above the smaller budget, and that of
the new choice is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.memory.table import Table, Way

MOST_PARTIAL = 256  # partial choices that are carried from block to block; beyond it, one is taken for a class
MOST_CANDIDATES = 32


@dataclass(frozen=True, kw_only=True)
class Candidate:
    ways: tuple[Way, ...]  # of each block of the table
    least: int  # bytes of activations, at the least
    work: float

    def told(self) -> dict[str, int]:
        """How many blocks go which way."""
        return {way: self.ways.count(way) for way in dict.fromkeys(self.ways)}


_Partial = tuple[float, int, int, tuple[Way, ...]]  # work, bytes kept, most bytes in a backward pass so far


def candidates(table: Table) -> list[Candidate]:
    """The cheapest first, each smaller than those before; what moves bytes elsewhere comes after all that does not."""
    found = _thinned(_frontier(table, ("plain", "selective", "full")))
    away = _candidate(table, ["away"] * len(table.blocks))
    return [*found, away] if away.least < found[-1].least else found


def _candidate(table: Table, ways: Sequence[Way]) -> Candidate:
    return Candidate(ways=tuple(ways), least=table.peak(ways), work=table.work(ways))


def _frontier(table: Table, ways: tuple[Way, ...]) -> list[Candidate]:
    """The choices that no other one beats in both work and peak, by a dynamic programme over the blocks.

    A partial choice that is no better than another in all of work, bytes kept and peak is dropped; exact up to
    MOST_PARTIAL of them."""
    partial: list[_Partial] = [(0.0, 0, 0, ())]
    for block in table.blocks:
        flights = table.most_flights(block.chunk)
        grown = [
            (
                work + block.work(way),
                kept + block.kept(way) * flights,
                max(most, block.outside + kept + block.filled_by(way)),
                (*taken, way),
            )
            for work, kept, most, taken in partial
            for way in ways
        ]
        partial = _few(_undominated(grown))
    found = sorted((_candidate(table, each[3]) for each in partial), key=lambda c: (c.work, c.least, c.ways))
    best: list[Candidate] = []
    for candidate in found:
        if not best or candidate.least < best[-1].least:
            best.append(candidate)
    return best


def _undominated(choices: list[_Partial]) -> list[_Partial]:
    left: list[_Partial] = []
    for choice in sorted(choices):
        if not any(kept <= choice[1] and most <= choice[2] for _, kept, most, _ in left):
            left.append(choice)
    return left


def _few(choices: list[_Partial]) -> list[_Partial]:
    """At most about MOST_PARTIAL, evenly over the bytes kept; the cheapest and the smallest stay."""
    if len(choices) <= MOST_PARTIAL:
        return choices
    ends = {min(choices), min(choices, key=lambda c: (c[1], c[2], c[0]))}
    low, high = min(c[1] for c in choices), max(c[1] for c in choices)
    classes: dict[int, _Partial] = {}
    for choice in choices:  # in the order of work: the first of a class is its cheapest
        classes.setdefault((choice[1] - low) * MOST_PARTIAL // max(high - low, 1), choice)
    return sorted(ends | set(classes.values()))


def _thinned(found: list[Candidate]) -> list[Candidate]:
    """At most MOST_CANDIDATES, evenly over their peaks: each may have to be tried."""
    low, span = found[-1].least, found[0].least - found[-1].least
    classes: dict[int, Candidate] = {}
    for candidate in found:  # the last of a class is its smallest
        classes[(candidate.least - low) * (MOST_CANDIDATES - 2) // max(span, 1)] = candidate
    return sorted({found[0], *classes.values()}, key=lambda c: c.work)
