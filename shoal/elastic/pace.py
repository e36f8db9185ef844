"""Which worker is slow, told from what all of them spend on a shard; and how many shards each should have for that."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WINDOW = 10  # steps that one judgement is made over
IN_A_ROW = 2  # judgements that must agree: a neighbour's short burst is no reason to move shards
SLOW = 1.5  # times the middle worker's seconds a shard
OF_A_SHARD = ("forward", "backward")


@dataclass
class Pace:
    """Seconds that each seat needs for a shard, from the accounts of all workers that rank 0 tells now and then."""

    seconds: dict[int, float] = field(default_factory=dict)  # seat -> seconds a shard, in the last whole window
    _spent: dict[int, float] = field(default_factory=dict)
    _steps: int = 0
    _slow_for: dict[int, int] = field(default_factory=dict)  # seat -> judgements in a row

    def changed(self) -> None:
        """Other workers, or other shards: what was being counted says nothing any more."""
        self._spent.clear()
        self._steps = 0
        self._slow_for.clear()

    def told(
        self, seats: Sequence[int], shards: Sequence[int], phases: Mapping[str, Sequence[float]], steps: int
    ) -> dict[int, str]:
        """Seat -> evidence, for each that has just been found slow. ``phases``: seconds by rank, over ``steps`` steps;
        ``shards``: how many each rank owns."""
        for rank, seat in enumerate(seats):
            spent = sum(phases.get(name, [0.0] * len(seats))[rank] for name in OF_A_SHARD)
            self._spent[seat] = self._spent.get(seat, 0.0) + spent / shards[rank]
        self._steps += steps
        if self._steps < WINDOW:
            return {}
        self.seconds = {seat: self._spent[seat] / self._steps for seat in seats}
        self._spent.clear()
        self._steps = 0
        found = {}
        for seat in seats:
            others = statistics.median(self.seconds[other] for other in seats if other != seat) if len(seats) > 1 else 0
            slow = bool(others) and self.seconds[seat] > SLOW * others
            self._slow_for[seat] = self._slow_for.get(seat, 0) + 1 if slow else 0
            if self._slow_for[seat] == IN_A_ROW:
                found[seat] = (
                    f"{self.seconds[seat] * 1e3:.1f} ms a shard, where the middle one of the others takes "
                    f"{others * 1e3:.1f} ms, over the last {IN_A_ROW * WINDOW} steps"
                )
        return found

    def deal(self, seats: Sequence[int], shards: int) -> tuple[int, ...]:
        """How many shards each seat should have so that all are done at about the same time; at least one each.

        One shard after the other goes to who would be done with it first. Seats of unknown pace count as the middle."""
        known = [self.seconds[seat] for seat in seats if seat in self.seconds]
        usual = statistics.median(known) if known else 1.0
        each = [self.seconds.get(seat, usual) or usual for seat in seats]
        counts = [1] * len(seats)
        for _ in range(shards - len(seats)):
            first = min(range(len(seats)), key=lambda rank: ((counts[rank] + 1) * each[rank], rank))
            counts[first] += 1
        return tuple(counts)


def evenly(seats: int, shards: int) -> tuple[int, ...]:
    return tuple(shards // seats + (rank < shards % seats) for rank in range(seats))
