"""Which blocks are computed again, and what goes elsewhere, so that a budget is kept at the least cost.

The candidates depend on the table alone, and the cheapest one that fits is taken. So a smaller budget never raises the
predicted peak: either the choice still fits, and stays the cheapest of fewer; or its peak was above the smaller budget,
and that of the new choice is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import UserError
from shoal.memory.table import Table, Way
from shoal.recipe.memory_plan import size_text

MOST_PARTIAL = 512  # partial choices that are carried from block to block; beyond it, costs are put into classes


@dataclass(frozen=True, kw_only=True)
class Candidate:
    ways: tuple[Way, ...]  # of each block of the table
    states_away: bool  # optimiser states are on disk between updates
    peak: int  # bytes of activations
    seconds: float


def candidates(table: Table, *, may_move: bool = True) -> list[Candidate]:
    """What is worth choosing from, cheapest first; what moves bytes elsewhere comes after all that does not."""
    here = _frontier(table, ("plain", "selective", "full"))
    if not may_move:
        return here
    away: list[Way] = ["away"] * len(table.blocks)
    last = _candidate(table, away)
    moved = [last] if table.blocks and last.peak < min(c.peak for c in here) else []
    lowest = moved[0] if moved else min(here, key=lambda c: c.peak)
    states = Candidate(ways=lowest.ways, states_away=True, peak=lowest.peak, seconds=lowest.seconds)
    return [*here, *moved, states]


def _candidate(table: Table, ways: Sequence[Way]) -> Candidate:
    return Candidate(ways=tuple(ways), states_away=False, peak=table.peak(ways), seconds=table.seconds(ways))


def _frontier(table: Table, ways: tuple[Way, ...]) -> list[Candidate]:
    """The choices that no other one beats in both seconds and peak, by a dynamic programme over the blocks.

    A partial choice is (seconds, bytes kept, most bytes in a backward pass so far); one that is no better than another
    in all three is dropped. That is exact up to MOST_PARTIAL of them."""
    partial: list[tuple[float, int, int, tuple[Way, ...]]] = [(0.0, 0, 0, ())]
    for block in table.blocks:
        grown = [
            (
                seconds + block.seconds(way),
                kept + block.kept(way),
                max(most, block.outside + kept + block.filled_by(way)),
                (*taken, way),
            )
            for seconds, kept, most, taken in partial
            for way in ways
        ]
        partial = _thinned(_undominated(grown))
    found = sorted((_candidate(table, p[3]) for p in partial), key=lambda c: (c.seconds, c.peak, c.ways))
    best: list[Candidate] = []
    for candidate in found:
        if not best or candidate.peak < best[-1].peak:
            best.append(candidate)
    return best


def _undominated(
    choices: list[tuple[float, int, int, tuple[Way, ...]]],
) -> list[tuple[float, int, int, tuple[Way, ...]]]:
    left: list[tuple[float, int, int, tuple[Way, ...]]] = []
    for choice in sorted(choices):
        if not any(kept <= choice[1] and most <= choice[2] for _, kept, most, _ in left):
            left.append(choice)
    return left


def _thinned(
    choices: list[tuple[float, int, int, tuple[Way, ...]]],
) -> list[tuple[float, int, int, tuple[Way, ...]]]:
    """At most about MOST_PARTIAL, evenly over the bytes kept; the cheapest and the smallest stay."""
    if len(choices) <= MOST_PARTIAL:
        return choices
    ends = {min(choices), min(choices, key=lambda c: (c[1], c[2], c[0]))}
    low, high = min(c[1] for c in choices), max(c[1] for c in choices)
    classes: dict[int, tuple[float, int, int, tuple[Way, ...]]] = {}
    for choice in choices:  # in the order of seconds: the first of a class is its cheapest
        classes.setdefault((choice[1] - low) * MOST_PARTIAL // max(high - low, 1), choice)
    return sorted(ends | set(classes.values()))


@dataclass(frozen=True, kw_only=True)
class Held:
    """What fills a worker's memory beside activations, in bytes."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    optimizer_away: int = 0  # what is left of the states in memory while they are on disk
    other: int = 0  # measured on a GPU: what kernels take while they run

    def total(self, *, states_away: bool = False) -> int:
        states = self.optimizer_away if states_away else self.optimizer
        return self.weights + self.gradients + states + self.other


def choose(found: Sequence[Candidate], held: Held, budget: int, device: str) -> Candidate:
    """The cheapest candidate that fits the budget.

    Raises UserError that says what fills the memory and which budget would do."""
    peaks = [candidate.peak + held.total(states_away=candidate.states_away) for candidate in found]
    for candidate, peak in zip(found, peaks, strict=True):
        if peak <= budget:
            return candidate
    least, candidate = min(zip(peaks, found, strict=True), key=lambda pair: pair[0])
    parts = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimiser states": held.optimizer_away if candidate.states_away else held.optimizer,
        "activations": candidate.peak,
        "kernels": held.other,
    }
    raise UserError(
        f"plan: memory.peak_bytes = {size_text(budget)!r} is too small on {device}: at the least "
        f"{', '.join(f'{name} take {size_text(count)}' for name, count in parts.items() if count)}. "
        f"Set memory.peak_bytes = {size_text(least)!r}, or use smaller micro-batches."
    )
