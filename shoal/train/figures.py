"""What workers tell each other of a step in a row of small numbers, and what the rows of all of them say."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shoal.comm.tree import tree_sum

STOP, CHECKSUM, WAITED, CHANGE, TOUCHED, FIRED = range(6)  # in a row; then sums and counts by leaf


@dataclass(frozen=True)
class StepFigures:
    """What a finished reduction says of the step, the same on every worker."""

    loss: float  # mean over the global batch
    targets: float  # the global denominator
    norm: float  # of the mean gradient, before clipping
    leaf_losses: tuple[float, ...]  # sum of each leaf's losses
    stop: bool  # a worker was asked to stop after this step
    change: bool  # other workers go on after this step
    checksums: tuple[float, ...]  # of each worker's parameters; 0.0 when not taken
    waited: tuple[float, ...]  # seconds that each worker waited for data up to its last backward pass


def figures_of(facts: Tensor, losses: Tensor, passes: Sequence[int], targets: float, norm: float) -> StepFigures:
    """``facts``: rows, [workers, facts]; ``losses``: the part of them that holds sums by leaf, [workers, leaves]."""
    sums = losses.sum(dim=0).tolist()  # one owner a leaf: nothing is rounded
    present = [loss for loss, count in zip(sums, passes, strict=True) if count]
    return StepFigures(
        loss=tree_sum(present) / targets,
        targets=targets,
        norm=norm,
        leaf_losses=tuple(sums),
        stop=bool(facts[:, STOP].any()),
        change=bool(facts[:, CHANGE].any()),
        checksums=tuple(facts[:, CHECKSUM].tolist()),
        waited=tuple(facts[:, WAITED].tolist()),
    )
