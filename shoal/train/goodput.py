"""Which batch makes the most progress per second, decided: step times and gradient noise in, batches out.

Goodput is throughput times statistical efficiency (Pollux: Qiao et al., OSDI 2021). The time of a step is fitted to the
run's own: its fullest worker makes ``passes`` passes, each of a fixed part and one that grows with its samples, and
there is a rest (exchange, update) that depends on the number of workers alone. How much of a pass is fixed is known
once two batches have been tried; until then all of it is taken for fixed, so that a larger batch is tried (Pollux
explores in the same spirit).

Pure: the same facts give the same decisions. But step times are clock readings, and no two runs have the same ones:
what was decided is written down, and a run that is to have the same bits is told (``Recorded``)."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shoal.cluster.cluster import counted
from shoal.train.noise import NoiseScale

SKIPPED = 2  # steps after a change: caches are cold, loading starts anew
REST, LONGEST_REST = 3, 48  # windows
GRID = 4  # sizes tried for each doubling of the batch


class Took(NamedTuple):
    """A committed step and what it took."""

    batch: int
    workers: int
    passes: int  # of the worker that makes most
    compute_s: float  # of the slowest worker, in its passes
    seconds: float


@dataclass(frozen=True)
class Decision:
    batch: int
    why: str
    goodput: tuple[float, float] | None  # of the batch before, and predicted of this one; None: nobody has looked


class Pass(NamedTuple):
    """Seconds of a pass of b samples: ``fixed + a * b``."""

    fixed: float
    a: float


@dataclass
class Goodput:
    """From the recipe's batch, ``base``, to ``most``, in multiples of ``unit``. A window is ``window`` steps; another
    batch has to promise at least ``least_gain`` more goodput, and is at most ``stride`` times as large, or as small.

    The way back from a change rests for some windows, for twice as many each time that it is taken: on a host whose
    load changes the batch settles. Other workers end the rest."""

    base: int
    most: int
    unit: int  # shards x micro-batches: the passes of a step, over all workers
    window: int = 20
    least_gain: float = 0.1
    stride: float = 2.0
    known: dict[tuple[int, int], tuple[int, float, float]] = field(default_factory=dict)
    # (workers, batch) -> passes of the fullest worker, s in them, s in all: the middle of the last window
    _at: tuple[int, int] = (0, 0)
    _steps: list[tuple[float, float]] = field(default_factory=list)
    _skip: int = SKIPPED
    _way: int = 0  # of the last change: 1 up, -1 down
    _rest: int = 0  # windows before the other way is open
    _rested: int = REST

    def committed(self, took: Took, noise: NoiseScale) -> Decision | None:
        """After each step: whether the batch is to become another one."""
        if (took.workers, took.batch) != self._at:
            if took.workers != self._at[0]:
                self._way, self._rest, self._rested = 0, 0, REST
            self._at, self._skip = (took.workers, took.batch), SKIPPED
            self._steps.clear()
        if self._skip:
            self._skip -= 1
            return None
        if took.seconds > 0:
            self._steps.append((min(took.compute_s, took.seconds), took.seconds))
        if len(self._steps) < self.window:
            return None
        compute, seconds = (statistics.median(column) for column in zip(*self._steps, strict=True))
        self.known[self._at] = (took.passes, compute, max(seconds, compute))
        self._steps.clear()
        self._rest = max(0, self._rest - 1)
        return self._decide(took.workers, took.batch, noise) if noise.known else None

    def sizes(self) -> list[int]:
        """The batches that may be used."""
        doublings = math.log2(self.most / self.base)
        powers = (self.base * 2 ** (i / GRID) for i in range(int(doublings * GRID) + 1))
        found = {round(size / self.unit) * self.unit for size in powers} | {self.most // self.unit * self.unit}
        return sorted(size for size in found if self.base <= size <= self.most)

    def shape(self, workers: int) -> Pass | None:
        """How a pass grows with its samples; None until two batches have been measured with one number of workers.

        Fitted by least squares, neither part below zero, of the number with most batches; of the same, the closest."""
        found = {n: sorted(b for m, b in self.known if m == n) for n, _ in self.known}
        several = [n for n in found if len(found[n]) > 1]
        if not several:
            return None
        like = max(several, key=lambda n: (len(found[n]), -abs(n - workers), -n))
        return _line([(b / self.unit, self.known[like, b][1] / max(1, self.known[like, b][0])) for b in found[like]])

    def seconds(self, workers: int, batch: int, other: int) -> float:
        """Predicted, of a step of ``other`` samples, by those of ``batch`` that these workers have just made."""
        _, compute, seconds = self.known[workers, batch]
        shape = self.shape(workers)
        if shape is None:
            return seconds
        of_both = [max(shape.fixed + shape.a * size / self.unit, 1e-12) for size in (other, batch)]
        return compute * of_both[0] / of_both[1] + seconds - compute

    def goodput(self, workers: int, batch: int, other: int, noise: NoiseScale) -> float:
        """Predicted as `seconds`: samples a second, each counted as what it is worth in steps of the recipe's batch."""
        return other / self.seconds(workers, batch, other) * noise.efficiency(other, self.base)

    def _decide(self, workers: int, batch: int, noise: NoiseScale) -> Decision | None:
        near = [size for size in self.sizes() if batch / self.stride <= size <= batch * self.stride]
        known = self.shape(workers) is not None
        if not known:
            near = [size for size in near if size in (batch, max(near))]  # to be told what is fixed, the farthest one
        now = self.goodput(workers, batch, batch, noise)
        best = max(near, key=lambda size: (self.goodput(workers, batch, size, noise), -size), default=batch)
        then = self.goodput(workers, batch, best, noise)
        way = 1 if best > batch else -1
        if best == batch or then < now * (1 + self.least_gain) or (way == -self._way and self._rest):
            return None
        if way == -self._way:
            self._rested = min(LONGEST_REST, 2 * self._rested)
        self._way, self._rest = way, self._rested
        tried = "" if known else "; one batch does not say what of a pass is fixed, so this one is tried"
        times = [self.seconds(workers, batch, size) * 1e3 for size in (batch, best)]
        why = (
            f"noise scale {noise.samples:.3g} samples, {times[0]:.3g} ms a step of {batch} with "
            f"{counted(workers, 'worker')}, {times[1]:.3g} ms of {best} predicted: goodput {now:.4g} -> {then:.4g} "
            f"samples/s{tried}"
        )
        return Decision(best, why, (now, then))

    # --- handing on -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain values, for `take`."""
        return {
            "known": [[*at, *measured] for at, measured in sorted(self.known.items())],
            "at": list(self._at),
            "steps": [list(step) for step in self._steps],
            "left": [self._skip, self._way, self._rest, self._rested],
        }

    def take(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.known = {(n, b): (passes, compute, seconds) for n, b, passes, compute, seconds in state["known"]}
        self._at = (state["at"][0], state["at"][1])
        self._steps = [(compute, seconds) for compute, seconds in state["steps"]]
        self._skip, self._way, self._rest, self._rested = state["left"]


def _line(points: list[tuple[float, float]]) -> Pass:
    """The least squares line through (samples, seconds), neither part of it below zero."""
    count = len(points)
    mean_b, mean_s = (sum(column) / count for column in zip(*points, strict=True))
    spread = sum((b - mean_b) ** 2 for b, _ in points)
    slope = sum((b - mean_b) * (s - mean_s) for b, s in points) / spread
    if slope <= 0:
        return Pass(mean_s, 0.0)
    if mean_s - slope * mean_b < 0:
        return Pass(0.0, sum(b * s for b, s in points) / sum(b * b for b, _ in points))
    return Pass(mean_s - slope * mean_b, slope)
