"""How many model processes there should be, as decisions only: load in, a number out, the time handed in.

More are wanted as soon as more requests are open than those that run can take in one batch each; fewer when fewer would
have been enough all the while for some time. The signal is work that is open, not a share of processor time: a model
process that is busy with one small batch is not short of help (compare Knative's concurrency target)."""

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bounds:
    least: int  # 0: all may leave when nothing is asked
    most: int
    each: int  # requests that one process should have at a time
    calm_s: float  # fewer are wanted once fewer would have done for so long

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most or self.most < 1 or self.each < 1 or self.calm_s < 0:
            raise ValueError(f"not bounds to scale between: {self}")


class Scaler:
    def __init__(self, bounds: Bounds, wanted: int, now: float) -> None:
        self.bounds = bounds
        self.wanted = wanted
        self._needs = deque([(now, wanted)])  # falling needs, each with when it last held

    def look(self, open_requests: int, now: float) -> int:
        """The number that is wanted now. To be called when requests come or end, and when ``next_at`` says so."""
        need = min(self.bounds.most, max(self.bounds.least, -(-open_requests // self.bounds.each)))
        self._needs[-1] = now, self._needs[-1][1]  # it has held until now
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((now, need))
        while len(self._needs) > 1 and self._needs[0][0] <= now - self.bounds.calm_s:
            self._needs.popleft()
        self.wanted = min(max(self.wanted, need), self._needs[0][1])
        return self.wanted

    def next_at(self) -> float | None:
        """When fewer may be wanted if nothing changes until then; None: never."""
        return None if len(self._needs) < 2 else self._needs[0][0] + self.bounds.calm_s
