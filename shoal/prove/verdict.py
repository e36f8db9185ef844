"""From fingerprints and deviations to a verdict: pure."""

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from shoal.prove.closeness import Deviation, first_beyond, of_kinds, relative
from shoal.prove.diagnosis import Evidence, looks_like
from shoal.prove.fingerprint import (
    KINDS,
    LOSS,
    MODEL,
    OPTIMIZER,
    Difference,
    StepPrint,
    first_difference,
    first_disagreement,
)
from shoal.prove.plans import label
from shoal.prove.trial import Trial, by_value
from shoal.recipe.plan import Plan

Found = tuple[float, str, Difference | None]  # the largest error, the tensor that has it, the first difference


def verdict(plan: Plan, trial: Trial, reference: Trial, tolerance: float, *, weights: bool) -> dict[str, Any]:
    """Whether the trial of a plan went as the reference did, and where it first went another way.

    ``tolerance``: for plans that add up in another order; ``weights``: these are a measure too, see `closeness`."""
    if plan.lossy:
        error, worst, differs = _lossy(trial, reference.prints[0], tolerance)
    elif by_value(plan):
        error, worst, differs = _near(plan, trial, tolerance, weights)
    else:
        error, worst, differs = _exact(plan, trial, reference)
    return {
        "plan": label(plan),
        "ok": differs is None and not trial.failure,
        "error": error if trial.ended else math.inf,
        "worst": worst,
        "differs": {"step": differs.step, "layer": differs.layer, "tensor": differs.tensor} if differs else None,
        "layers": list(differs.layers) if differs else [],
        "looks_like": looks_like(differs, evidence(plan, differs, trial, reference)) if differs else "",
        "ranks": list(differs.ranks) if differs else [],
        "shards": list(differs.shards) if differs else [],
        "tolerance": math.inf if plan.lossy else tolerance if by_value(plan) else 0.0,
        "lossy": plan.lossy,
        "weights_sha256": trial.ended[0].weights_sha256 if trial.ended else None,
        "seconds": trial.seconds,
        "failure": trial.failure,
    }


def evidence(plan: Plan, differs: Difference, trial: Trial, reference: Trial) -> Evidence:
    """All that is known of the step at which a plan first differs."""
    number = differs.step - reference.prints[0][0].step
    if by_value(plan):
        workers = {0: trial.whole[number].prints} if number < len(trial.whole) else {}
    else:
        workers = {rank: prints[number] for rank, prints in enumerate(trial.prints) if number < len(prints)}
    before = reference.prints[0][number - 1] if number else None
    return Evidence(reference.prints[0][number], before, workers, reference.ended[0].uses, _crossing(plan))


def _crossing(plan: Plan) -> str:
    """What goes from worker to worker inside of a pass."""
    rows = plan.axis_of("rows") == "tensor"
    carried = {
        "pipe": "what stages send each other",
        "expert": "the tokens that travel to experts",
        "context": "the keys and values that travel along the sequence",
        "tensor": "the halo rows of images" if rows else "what is summed and gathered along axis 'tensor'",
    }
    return ", or ".join(carried[axis] for axis, size in plan.axes.sizes if size > 1 and axis in carried)


def _kinds(plan: Plan) -> list[tuple[str, ...]]:
    """The kinds of tensors that each worker can show after a step."""
    if plan.server_processes:  # gradients and the optimiser's state are the servers'
        return [(MODEL,)] * plan.workers
    if plan.shards_states:  # each has slices of them; states are brought together on the first replica
        places = [plan.axes.coordinates(rank) for rank in range(plan.workers)]
        first = [all(place.get(axis, 0) == 0 for axis in ("data", "context")) for place in places]
        return [(MODEL, OPTIMIZER) if shows else (MODEL,) for shows in first]
    return [KINDS] * plan.workers


def _exact(plan: Plan, trial: Trial, reference: Trial) -> Found:
    error, tensor = max(((worker.error, worker.tensor) for worker in trial.ended), default=(math.inf, ""))
    differs = first_difference(reference.prints[0], trial.prints, _kinds(plan), parts=plan.splits_model)
    wanted = reference.ended[0].weights_sha256
    odd = tuple(rank for rank, worker in enumerate(trial.ended) if worker.weights_sha256 != wanted)
    if differs is None and odd:  # they changed after the last step's commit
        differs = Difference(reference.prints[0][-1].step, tensor, odd, ())
    return error, tensor if error else "", differs


def _near(plan: Plan, trial: Trial, tolerance: float, weights: bool) -> Found:
    # workers that hold the same agree to the bit in every mode
    parted = first_disagreement(_replicas(plan), trial.prints, _kinds(plan))
    found = of_kinds([whole.deviations for whole in trial.whole], weights=weights)
    worst = max(found, key=lambda deviation: deviation.size, default=None)
    beyond = first_beyond(found, tolerance, len(trial.prints))
    if beyond is not None and (parted is None or beyond.step < parted.step):
        parted = beyond
    return (worst.size, worst.tensor, parted) if worst else (math.inf, "", parted)


def _replicas(plan: Plan) -> list[list[int]]:
    """Ranks that hold the same tensors."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in range(plan.workers):
        groups[plan.axes.along(rank, "data", "context")].append(rank)
    return list(groups.values())


def _lossy(trial: Trial, reference: Sequence[StepPrint], tolerance: float) -> Found:
    """A plan that says it is lossy is held to what remains: the workers agree to the bit, the first step's losses (no
    gradient has touched its weights) are the reference's, and all are finite. The error is the largest of a loss."""
    parted = first_difference(trial.prints[0], trial.prints)
    losses = [
        Deviation(expected.step, LOSS, relative(a, b), (shard,))
        for expected, found in zip(reference, trial.prints[0], strict=False)
        for shard, (a, b) in enumerate(zip(expected.losses, found.losses, strict=True))
    ]
    error = max((deviation.size for deviation in losses), default=math.inf)
    first = [deviation for deviation in losses if deviation.step == reference[0].step]
    workers = len(trial.prints)
    differs = parted or first_beyond(first, tolerance, workers) or first_beyond(losses, sys.float_info.max, workers)
    return error, LOSS, differs
