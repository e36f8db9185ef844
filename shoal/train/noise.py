"""How noisy gradients are: measured on the gradients of a step's passes, which the exact reduction has anyway.

The gradient noise scale is tr(Sigma) / |G|^2: G the true gradient, Sigma the covariance of one sample's. Steps of much
fewer samples are mostly noise, steps of many more are mostly the same step (McCandlish et al., 2018, "An Empirical
Model of Large-Batch Training", section 2; the estimators are those of its appendix A.1: the squared norm of the mean
gradient of b samples is |G|^2 + tr(Sigma) / b on average, and a step has it for two values of b)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

SMOOTHED = 0.98  # of an average, what stays after one more step
LEAST_SEEN = 20  # steps, before an average counts


@dataclass
class NoiseScale:
    """Averages over the last steps, about 1 / (1 - SMOOTHED) of them; plain numbers, the same on every worker."""

    signal: float = 0.0  # of |G|^2, not yet divided by ``weight``
    noise: float = 0.0  # of tr(Sigma), in samples; likewise
    weight: float = 0.0
    seen: int = 0

    def add(self, small: float, big: float, passes: int, batch: int) -> None:
        """A step of ``batch`` samples in ``passes`` equal passes: the mean square norm of the passes' mean gradients,
        and that of the whole step's mean gradient."""
        if passes < 2 or not (math.isfinite(small) and math.isfinite(big)):
            return
        signal = (passes * big - small) / (passes - 1)
        noise = (small - big) * batch / (passes - 1)
        self.signal = SMOOTHED * self.signal + (1 - SMOOTHED) * signal
        self.noise = SMOOTHED * self.noise + (1 - SMOOTHED) * noise
        self.weight = SMOOTHED * self.weight + (1 - SMOOTHED)
        self.seen += 1

    @property
    def known(self) -> bool:
        return self.seen >= LEAST_SEEN

    @property
    def samples(self) -> float:
        """tr(Sigma) / |G|^2, in samples; infinite where noise hides the gradient, 0 where there is none."""
        if self.noise <= 0:
            return 0.0
        return self.noise / self.signal if self.signal > 0 else math.inf

    def efficiency(self, batch: int, base: int) -> float:
        """Progress of a sample in steps of ``batch``, over that in steps of ``base``: (scale + base) / (scale + batch).

        The statistical efficiency of Pollux (Qiao et al., OSDI 2021, section 3.1)."""
        scale = self.samples
        return 1.0 if math.isinf(scale) else (scale + base) / (scale + batch)

    def gain(self, batch: int, base: int) -> float:
        """How many steps of ``base`` one of ``batch`` is worth, at most batch / base: AdaScale's gain ratio.

        Johnson et al., ICML 2020, "AdaScale SGD"; the learning rate is multiplied by it."""
        return self.efficiency(batch, base) * batch / base

    def state(self) -> dict[str, Any]:
        return asdict(self)


class PassSquares:
    """The part of a worker's row of facts that tells of this: for each leaf the sum, over its passes, of the square
    norm of the pass's mean gradient, then how long the step before took."""

    def __init__(self, start: int, leaves: int, *, measures: bool) -> None:
        """``start``: where the part begins in the row. Without ``measures`` there is none, and nothing is looked at."""
        self._start, self._leaves, self._measures = start, leaves, measures
        self._leaf, self._count = -1, 0.0
        self._found: list[torch.Tensor] = []
        self.took = (0.0, 0.0)  # the last step of this worker: seconds in passes, seconds in all

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self._leaves + 2 if self._measures else 0

    @property
    def starts(self) -> tuple[int, ...]:
        """Where numbers by leaf begin."""
        return (self._start,) if self._measures else ()

    def opens(self, leaf: int, count: float) -> None:
        """A backward pass of a loss that is a sum over ``count`` targets."""
        self._leaf, self._count = leaf, count
        self._found = []

    def saw(self, gradient: torch.Tensor) -> None:
        """The gradient of one parameter, before anything is added to it."""
        if self._measures:
            self._found.append((gradient * gradient).sum(dtype=torch.float64))

    def fold(self, facts: torch.Tensor) -> None:
        """Put what the pass has shown into the row; again changes nothing."""
        if self._leaf < 0 or not self._measures:
            return
        squares = math.fsum(torch.stack(self._found).tolist()) if self._found else 0.0
        facts[self._start + self._leaf] += squares / max(self._count, 1.0) ** 2
        facts[self._start + self._leaves], facts[self._start + self._leaves + 1] = self.took
        self._leaf = -1

    def read(self, rows: torch.Tensor, passes: Sequence[int]) -> tuple[float, float, float]:
        """From all workers' rows, [workers, facts], of a finished step: the mean over its passes of the square norms,
        and of the step before the seconds of the slowest worker: in passes, and in all."""
        leaves = rows[:, self._start : self._start + self._leaves].sum(dim=0).tolist()  # one owner each: exact
        times = rows[:, self._start + self._leaves : self._start + self._leaves + 2]
        compute, seconds = times.max(dim=0).values.tolist()
        return math.fsum(leaves) / max(1, sum(passes)), compute, seconds
