"""The highest rate of requests that a server still answers within a target, as decisions only."""

from dataclasses import dataclass

STEP = 1.5  # from one rate to the next while the limit lies on one side only
NEAR = 1.04  # a rate that holds, so near to one that does not, is the answer
MOST_TRIALS = 20


@dataclass
class Search:
    """Ask for ``rate``, try it, ``tell`` what came of it; until ``done``.

    A rate that misses the target is tried once more: a moment in which the machine did something else is no limit."""

    rate: float  # requests a second, to be tried next
    holds: float = 0.0  # the highest that kept the target
    breaks: float = float("inf")  # the lowest that did not
    trials: int = 0
    again: bool = False  # it has missed once

    @property
    def done(self) -> bool:
        return self.trials >= MOST_TRIALS or self.breaks <= self.holds * NEAR or self.breaks < 0.1

    def tell(self, kept: bool) -> None:
        self.trials += 1
        if kept:
            self.holds, self.again = max(self.holds, self.rate), False
        elif not self.again:
            self.again = True
            return
        else:
            self.again = False
            self.breaks = min(self.breaks, self.rate)
        if self.breaks == float("inf"):
            self.rate = self.holds * STEP
        elif not self.holds:
            self.rate = self.breaks / STEP
        else:
            self.rate = (self.holds * self.breaks) ** 0.5


def kept(figures: "dict[str, object]", quantile: str, target_ms: float) -> bool:
    """Whether nothing was refused or failed, and this percentile of all answers lies within the target."""
    all_ms = figures["all_ms"]
    assert isinstance(all_ms, dict)
    return figures["ok"] == figures["asked"] and all_ms.get(quantile, float("inf")) <= target_ms
