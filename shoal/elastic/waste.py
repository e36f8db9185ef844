"""What a lost worker costs: the step in flight, which all were working on since the last one was committed."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Waste:
    """Of one epoch, told once: the first worker that is lost ends it, and with it the work of all."""

    seats: tuple[int, ...]  # of the epoch, the lost ones too
    step: int  # the last committed one
    since_s: float
    _took: tuple[float, int] | None = None

    def committed(self, step: int, now: float) -> None:
        self.step, self.since_s = step, now

    def broke(self, begun: int, now: float) -> None:
        """Nobody works any more; ``begun``: the newest step that somebody had begun."""
        if self._took is None:
            self._took = now - self.since_s, max(0, begun - self.step)

    def told(self, begun: Callable[[], int], now: float) -> dict[str, float]:
        """Of the first loss of an epoch: ``cost_s``, seconds of every worker, and ``steps`` that are to be done again.
        Later ones cost nothing more."""
        self.broke(begun(), now)
        (cost_s, steps), self._took = self._took or (0.0, 0), (0.0, 0)
        return {"cost_s": round(cost_s, 6), "steps": steps}
