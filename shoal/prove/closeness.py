"""How close a run in the fast mode is to the reference, whose additions it makes in another order.

Weights are no measure: where a gradient is zero but for rounding (a bias before a normalisation, the bias of attention
keys), Adam divides the rounding by itself, and the weight wanders without any effect on the loss. Gradients and losses
are compared: a gradient's norm relative to the global norm, a shard's loss relative to itself.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shoal.prove.fingerprint import LOSS, Difference, StepPrint


@dataclass(frozen=True)
class Deviation:
    step: int
    tensor: str
    size: float
    shards: tuple[int, ...] = ()


def deviations(reference: Sequence[StepPrint], run: Sequence[StepPrint]) -> Iterator[Deviation]:
    """Every gradient and then the losses of every step that the run has done."""
    for expected, found in zip(reference, run, strict=False):
        wanted, have = _gradients(expected), _gradients(found)
        scale = math.hypot(*wanted.values()) or 1.0
        for name in dict.fromkeys((*wanted, *have)):
            yield Deviation(expected.step, name, _relative(wanted.get(name), have.get(name), scale))
        for shard, (a, b) in enumerate(zip(expected.losses, found.losses, strict=True)):
            yield Deviation(expected.step, LOSS, _relative(a, b, abs(a) or 1.0), (shard,))


def _gradients(prints: StepPrint) -> dict[str, float]:
    return {name: p.norm for name, p in prints.tensors.items() if name.startswith("gradient/")}


def _relative(wanted: float | None, found: float | None, scale: float) -> float:
    if wanted is None or found is None:
        return math.inf
    size = abs(wanted - found) / scale
    return size if math.isfinite(size) else math.inf


def first_beyond(found: Sequence[Deviation], tolerance: float, workers: int) -> Difference | None:
    """The first deviation above the tolerance, and the shards whose loss deviates at that step."""
    beyond = [deviation for deviation in found if deviation.size > tolerance]
    if not beyond:
        return None
    first = beyond[0]
    shards = [shard for deviation in beyond if deviation.step == first.step for shard in deviation.shards]
    return Difference(first.step, first.tensor, tuple(range(workers)), tuple(shards))
