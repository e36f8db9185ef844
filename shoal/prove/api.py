"""The equivalence prover: one recipe under several plans, held against a plain loop, tensor by tensor."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.comm.launch import Agent
from shoal.errors import UserError
from shoal.prove.plans import standard_plans
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.train.able import check_trainable

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[Mapping[str, Any]], None]
PRELOAD = ("shoal.prove.trial", "torch._dynamo")  # the latter comes with the first optimiser, in a second
WORKERS = (1, 2, 3, 4, 5, 8)
FAST_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # other roundings of a weight to bfloat16 grow step by step


def prove(
    recipe: Recipe,
    *,
    workers: tuple[int, ...] | None = None,
    steps: int = 20,
    plans: Sequence[Plan] | None = None,
    progress: Progress | None = None,
    model: "Callable[[], nn.Module] | None" = None,
    data: Any = None,
    agent: Agent | None = None,
) -> dict[str, Any]:
    """Run a recipe for ``steps`` steps under every plan, and compare every tensor of every step with a plain loop's.

    ``plans``, or else those of `standard_plans` over ``workers`` (those of 1, 2, 3, 4, 5, 8 that the shards allow).
    ``model`` and ``data`` stand in for the recipe's own, as in `shoal.train`. ``progress`` gets the runs' events.
    ``agent``: use this one's processes, for many proofs in a row.

    Returns {"plans": [{"plan", "ok", "error", "differs", ...}], "reference", "precision", "tolerance"}: ``error`` is
    the largest deviation of a weight tensor at the end over the reference's largest element in it (0.0 to the bit, inf
    for a run that failed), ``differs`` is None or the first {"step", "tensor"}, in the order gradient/, model/,
    optimizer/ and the model's own. ``ranks`` differ there, and ``shards`` name those whose loss does: a wrong sum
    leaves them empty. A fast plan may differ within the tolerance; its error is that of `closeness`.
    Raises UserError for input that no run can use, and RunFailed when the reference itself fails."""
    from shoal.prove.trial import Subject, launch_plan, launch_reference, settle
    from shoal.prove.verdict import verdict

    if steps < 1:
        raise UserError(f"a proof needs at least 1 step, got {steps}.")
    if plans is None:
        counts = workers or tuple(count for count in WORKERS if count <= recipe.shards)
        plans = standard_plans(counts, recipe.shards)
    for plan in plans:
        plan.owned(recipe.shards)
        check_trainable(plan)
        if plan.sync == "local" or plan.staleness:
            raise UserError(f"proofs compare steps that all workers share; in this plan {plan.lossy}: leave it out.")
        if plan.device == "cuda":
            raise UserError("a proof compares on the CPU, whose kernels the reference uses: leave device = 'cuda' out.")
    report = replace(recipe.report, checkpoint_every=0, evaluate_samples=recipe.batch, sample=False, tensorboard=False)
    short = replace(recipe, steps=steps, epochs=0, report=report)
    crew_of_its_own = nullcontext(agent) if agent else Agent(PRELOAD)
    with crew_of_its_own as crew, tempfile.TemporaryDirectory(prefix="shoal-prove-") as folder:
        [settled] = crew.run(settle, (short,), workers=1, threads=short.threads)
        subject = Subject(settled, model, data)
        final = Path(folder) / "reference.safetensors"
        reference = launch_reference(crew, subject, final)
        verdicts = []
        for number, plan in enumerate(plans):
            run_dir = Path(folder) / f"run-{number}"
            trial = launch_plan(crew, subject, replace(plan, device="cpu"), run_dir, final, progress)
            verdicts.append(verdict(plan, trial, reference, FAST_TOLERANCE[settled.precision]))
            shutil.rmtree(run_dir, ignore_errors=True)  # its checkpoint, as large as the model
    return {
        "plans": verdicts,
        "reference": {"weights_sha256": reference.ended[0].weights_sha256, "seconds": reference.seconds},
        "steps": steps,
        "precision": settled.precision,
        "tolerance": {"exact": 0.0, "fast": FAST_TOLERANCE[settled.precision]},
    }
