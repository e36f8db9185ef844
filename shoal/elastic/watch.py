"""Who makes no progress, told from the run's own step times: positions and a clock in, evidence out."""

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
    _begun: dict[int, tuple[float, float]] = field(default_factory=dict)  # row -> its phase's since_s, cpu_s then

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

    def late(self, found: Sequence[tuple[Position, Look]], now: float) -> list[tuple[int, str]]:
        """(row, evidence) of those without progress. ``found``: members of the epoch, and what the kernel says of
        each. Who waits for another one is not late, unless all do; and of one that computes, the time counts that it
        has had a core: a machine that is too busy is no worker's fault."""
        late = []
        for position, (state, cpu_s) in found:
            stood, limit = now - position.since_s, self.limit_s(position.phase, state)
            since, before = self._begun.get(position.rank, (0.0, 0.0))
            if since != position.since_s:
                before = cpu_s
                self._begun[position.rank] = (position.since_s, before)
            if position.phase is Phase.waiting and state != STOPPED:
                continue
            if stood > limit and (state != COMPUTING or cpu_s - before > limit):
                said = f"99 of 100 steps take at most {self.slowest_s:.2g} s" if self.times else "no step is done yet"
                late.append((position.rank, f"no progress for {stood:.1f} s at {position} ({state}); {said}"))
        if late or not found:
            return late
        if all(now - p.since_s > self.patience_s and p.phase is Phase.waiting for p, _ in found):
            first = min((p for p, _ in found), key=lambda p: p.since_s)
            others = "; ".join(str(p) for p, _ in found)
            return [(first.rank, f"all workers wait for each other since {now - first.since_s:.0f} s: {others}")]
        return []
