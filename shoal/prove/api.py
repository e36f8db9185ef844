"""The equivalence prover: one recipe under several plans, held against a plain loop, tensor by tensor.

docs/prove.md shows it in a test of one's own."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shoal.comm.launch import Agent
from shoal.errors import UserError
from shoal.prove.place import place_of
from shoal.prove.plans import label, of_families, standard_plans
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.scratch import scratch_folder
from shoal.train.able import check_trainable

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[Mapping[str, Any]], None]
PRELOAD = ("shoal.prove.trial", "torch._dynamo")  # the latter comes with the first optimiser, in a second
WORKERS = (1, 2, 3, 4, 5, 8)
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2}  # roundings of a weight to bfloat16 grow by the step


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
    ``model`` and ``data`` stand in for the recipe's own, as in `shoal.train`. ``progress`` gets the runs' events, and
    after each plan an event "proved" with its verdict. ``agent``: use this one's processes, for many proofs in a row.

    Returns {"ok", "differences", "plans", "reference", "steps", "precision", "tolerance"}. ``ok`` is whether all plans
    are, ``differences`` has a line for each that is not. Each of ``plans`` has:

    - ``plan``, ``ok``, ``seconds``, ``failure`` (of a run that failed), ``lossy``
    - ``error``: 0.0 where every bit is the same; else of an exact plan the largest deviation of a weight at the end, of
      another the largest of all steps as `closeness` counts it, that of the tensor ``worst``; inf for a failed run
    - ``tolerance``: 0.0 for an exact plan. One that splits tensors, sequences or experts, or adds up fast, may differ
      by 1e-10 in a float64 model, 1e-5 in float32 and 1e-2 in bfloat16
    - ``differs``: None, or the first {"step", "layer", "tensor"}, in the order gradient/, model/, optimizer/ and the
      model's own. ``layers`` are all that differ at that step, ``ranks`` the workers that do, ``shards`` those whose
      loss does: a wrong sum leaves them empty. ``looks_like`` says what kind of fault that fits

    Raises UserError for input that no run can use, and RunFailed when the reference itself fails."""
    from shoal.prove.trial import Subject, by_value, launch_plan, launch_reference, settle
    from shoal.prove.verdict import verdict

    if steps < 1:
        raise UserError(f"a proof needs at least 1 step, got {steps}.")
    if plans is None:
        counts = workers or tuple(count for count in WORKERS if count <= recipe.shards)
        plans = standard_plans(counts, recipe.shards)
    for plan in plans:
        check(plan, recipe, model, data)
    report = replace(recipe.report, checkpoint_every=0, evaluate_samples=recipe.batch, sample=False, tensorboard=False)
    short = replace(recipe, steps=steps, epochs=0, report=report)
    crew_of_its_own = nullcontext(agent) if agent else Agent(PRELOAD)
    with crew_of_its_own as crew, scratch_folder("shoal-prove-") as folder:
        [settled] = crew.run(settle, (short,), workers=1, threads=short.threads)
        subject = Subject(settled, model, data)
        reference = launch_reference(crew, subject, folder, values=any(map(by_value, plans)))
        wide = reference.ended[0].wide
        tolerance = TOLERANCE["float64" if wide else settled.precision]
        verdicts = []
        for number, plan in enumerate(plans):
            run_dir = folder / f"run-{number}"
            trial = launch_plan(crew, subject, replace(plan, device="cpu"), run_dir, reference, progress)
            weights = wide or settled.optimizer.name.lower() == "sgd"
            verdicts.append(verdict(plan, trial, reference, tolerance, weights=weights))
            shutil.rmtree(run_dir, ignore_errors=True)  # its checkpoint, as large as the model
            if progress:
                progress({"event": "proved", "number": number + 1, "of": len(plans), **verdicts[-1]})
    return {
        "ok": all(found["ok"] for found in verdicts),
        "differences": [f"{found['plan']}: {place_of(found)}" for found in verdicts if not found["ok"]],
        "plans": verdicts,
        "reference": {"weights_sha256": reference.ended[0].weights_sha256, "seconds": reference.seconds},
        "steps": steps,
        "precision": "float64" if wide else settled.precision,
        "tolerance": {"exact": 0.0, "fast": tolerance},
    }


def prove_standard(
    *,
    models: Sequence[str] = (),
    families: Sequence[str] = ("standard",),
    steps: int = 20,
    progress: Progress | None = None,
    agent: Agent | None = None,
) -> dict[str, Any]:
    """The standard list: tiny models of seven kinds, each under the plans that split it; see `shoal.prove.standard`.

    ``models``: kinds of models, all if empty; ``families``: of plans, see `plans.FAMILIES`. Returns what `prove` does,
    with the "model" of each plan, and without "reference" and "tolerance". Raises UserError for unknown names."""
    from shoal.prove.standard import KINDS, standard

    chosen = [replace(case, plans=of_families(case.plans, families)) for case in standard(models or KINDS)]
    chosen = [case for case in chosen if case.plans]
    if not chosen:
        raise UserError(f"the standard list has no plan of {', '.join(families)} for {', '.join(models)}.")
    total = sum(len(case.plans) for case in chosen)
    plans: list[dict[str, Any]] = []
    differences: list[str] = []

    def tell(model: str, done: int) -> Progress:
        def told(event: Mapping[str, Any]) -> None:
            if progress and event["event"] == "proved":
                progress({**event, "model": model, "number": done + event["number"], "of": total})

        return told

    with nullcontext(agent) if agent else Agent(PRELOAD) as crew:
        for case in chosen:
            found = prove(
                case.recipe,
                steps=steps,
                plans=case.plans,
                data=case.data,
                model=case.model,
                agent=crew,
                progress=tell(case.name, len(plans)),
            )
            plans += [{"model": case.name, **verdict} for verdict in found["plans"]]
            differences += [f"{case.name}: {line}" for line in found["differences"]]
    return {"ok": not differences, "differences": differences, "plans": plans, "steps": steps}


def fitting(
    recipe: Recipe,
    families: Sequence[str] = ("standard",),
    model: "Callable[[], nn.Module] | None" = None,
    data: Any = None,
) -> tuple[list[Plan], list[tuple[str, str]]]:
    """Plans of the standard list for a recipe of one's own, and (plan, why) of those that it cannot be trained under.

    Raises UserError for unknown families, and when no plan is left."""
    from shoal.prove.standard import every_plan

    fit, others = [], []
    for plan in of_families(every_plan(), families):
        try:
            check(plan, recipe, model, data)
            fit.append(plan)
        except UserError as error:
            others.append((label(plan), str(error)))
    if not fit:
        raise UserError(f"no plan of {', '.join(families)} fits this recipe: {others[0][1]}")
    return fit, others


def check(plan: Plan, recipe: Recipe, model: "Callable[[], nn.Module] | None" = None, data: Any = None) -> None:
    """Raises UserError for a plan that cannot train the recipe's model, or that cannot be compared."""
    plan.owned(recipe.shards)
    check_trainable(plan, recipe)
    if recipe.batching.policy != "fixed":
        raise UserError(
            f"recipe: batching.policy = {recipe.batching.policy!r}: a proof's plain loop keeps its batch: prove with "
            f"--batch-policy fixed."
        )
    if plan.sync == "local" or plan.staleness:
        raise UserError(
            f"plan {label(plan)}: proofs compare steps that all workers share; in this plan {plan.lossy}: leave it out."
        )
    if plan.device == "cuda":
        raise UserError("a proof compares on the CPU, whose kernels the reference uses: leave device = 'cuda' out.")
    if plan.splits_model:
        from shoal.train.legality import check_split

        check_split(recipe, plan, model, data)
