"""Who makes no progress, told from the run's own step times: positions and a clock in, evidence out."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.comm.status import Phase, Position
from shoal.elastic.kernel import COMPUTING, Look

LEAST_S = 2.0  # shorter pauses are noise, on a busy machine
TIMES_P99 = 3.0
KNOWN_AFTER = 5  # committed steps; before, and in phases that are no part of a step, the plan's patience counts
REMEMBERED = 200  # step times
STOPPED = "stopped by a signal"
_OF_A_STEP = (Phase.loading, Phase.forward, Phase.backward, Phase.exchanging, Phase.updating)


@dataclass
class Watch:
    patience_s: float  # for building, evaluating and saving; five times as long before the first step
    times: "deque[float]" = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _begun: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    # row -> its phase's since_s as it says, cpu_s then, and since when by this process's own clock
    _looked: float = -math.inf

    def committed(self, seconds: float) -> None:
        self.times.append(seconds)

    @property
    def slowest_s(self) -> float:
        """The 99th percentile of the last step times."""
        return sorted(self.times)[int(0.99 * (len(self.times) - 1))] if self.times else 0.0

    def limit_s(self, phase: Phase, state: str) -> float:
        known = max(LEAST_S, TIMES_P99 * self.slowest_s)
        if state == STOPPED:
            return known
        if phase in _OF_A_STEP:
            return known if len(self.times) >= KNOWN_AFTER else max(known, 5 * self.patience_s)
        return self.patience_s * (1 if self.times else 5)

    def late(self, found: Sequence[tuple[Position, Look]], now: float, *, whole: bool = True) -> list[tuple[int, str]]:
        """(row, evidence) of those without progress. ``found``: members of the epoch, and what the kernel says of
        each. Who waits for another one is not late, unless all do; and of one that computes, the time counts that it
        has had a core: a machine that is too busy is no worker's fault. ``whole``: these are all members."""
        late = []
        for position, (ask, cpu_s) in found:
            said, before, since = self._begun.get(position.rank, (math.nan, 0.0, 0.0))
            if said != position.since_s:  # believed where it lies between two looks: clocks may be wrong
                before, since = cpu_s, position.since_s if self._looked <= position.since_s <= now else now
                self._begun[position.rank] = (position.since_s, before, since)
            stood = now - since
            if stood <= min(LEAST_S, self.patience_s):
                continue  # no limit is shorter
            limit = self.limit_s(position.phase, state := ask())
            if position.phase is Phase.waiting and state != STOPPED:
                continue
            if stood > limit and (state != COMPUTING or cpu_s - before > limit):
                usual = f"99 of 100 steps take at most {self.slowest_s:.2g} s" if self.times else "no step is done yet"
                late.append((position.rank, f"no progress for {stood:.1f} s at {position} ({state}); {usual}"))
        self._looked = now
        if late or not found or not whole:
            return late
        if all(now - self._begun[p.rank][2] > self.patience_s and p.phase is Phase.waiting for p, _ in found):
            first = min((p for p, _ in found), key=lambda p: self._begun[p.rank][2])
            others, stood = "; ".join(str(p) for p, _ in found), now - self._begun[first.rank][2]
            return [(first.rank, f"all workers wait for each other since {stood:.0f} s: {others}")]
        return []
