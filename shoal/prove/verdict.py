"""From fingerprints to a verdict: pure."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shoal.prove.closeness import deviations, first_beyond
from shoal.prove.fingerprint import LOSS, Difference, StepPrint, first_difference, weights_of
from shoal.prove.plans import label
from shoal.prove.trial import Trial
from shoal.recipe.plan import Plan


def verdict(plan: Plan, trial: Trial, reference: Trial, fast_tolerance: float) -> dict[str, Any]:
    """Whether the trial of a plan went as the reference did, and where it first went another way."""
    fast = plan.sync == "fast"
    if plan.lossy:
        error, differs = _lossy(trial, reference.prints[0], fast_tolerance)
    else:
        error, differs = _fast(trial, reference.prints[0], fast_tolerance) if fast else _exact(plan, trial, reference)
    return {
        "plan": label(plan),
        "ok": differs is None and not trial.failure,
        "error": error if trial.ended else math.inf,
        "differs": {"step": differs.step, "tensor": differs.tensor} if differs else None,
        "ranks": list(differs.ranks) if differs else [],
        "shards": list(differs.shards) if differs else [],
        "tolerance": math.inf if plan.lossy else fast_tolerance if fast else 0.0,
        "lossy": plan.lossy,
        "weights_sha256": trial.ended[0].weights_sha256 if trial.ended else None,
        "seconds": trial.seconds,
        "failure": trial.failure,
    }


def _exact(plan: Plan, trial: Trial, reference: Trial) -> tuple[float, Difference | None]:
    error, tensor = max(((worker.error, worker.tensor) for worker in trial.ended), default=(math.inf, ""))
    expected = reference.prints[0]
    if plan.server_processes:  # gradients and the optimiser's state are the servers': the workers hold the weights
        expected = [weights_of(prints) for prints in expected]
        trial = replace(trial, prints=[[weights_of(prints) for prints in worker] for worker in trial.prints])
    differs = first_difference(expected, trial.prints)
    wanted = reference.ended[0].weights_sha256
    odd = tuple(rank for rank, worker in enumerate(trial.ended) if worker.weights_sha256 != wanted)
    if differs is None and odd:  # they changed after the last step's commit
        differs = Difference(reference.prints[0][-1].step, tensor, odd, ())
    return error, differs


def _fast(trial: Trial, reference: Sequence[StepPrint], tolerance: float) -> tuple[float, Difference | None]:
    apart = first_difference(trial.prints[0], trial.prints)  # the workers agree to the bit in every mode
    found = list(deviations(reference, trial.prints[0]))
    error = max((deviation.size for deviation in found), default=0.0)
    return error, apart or first_beyond(found, tolerance, len(trial.prints))


def _lossy(trial: Trial, reference: Sequence[StepPrint], tolerance: float) -> tuple[float, Difference | None]:
    """A plan that says it is lossy is held to what remains: the workers agree to the bit, the first step's losses (no
    gradient has touched its weights) are the reference's, and all are finite. The error is the largest of a loss."""
    apart = first_difference(trial.prints[0], trial.prints)
    losses = [found for found in deviations(reference, trial.prints[0]) if found.tensor == LOSS]
    error = max((deviation.size for deviation in losses), default=math.inf)
    first = [deviation for deviation in losses if deviation.step == reference[0].step]
    workers = len(trial.prints)
    return error, apart or first_beyond(first, tolerance, workers) or first_beyond(losses, sys.float_info.max, workers)
