"""Fault rehearsal: the same recipe undisturbed, and with workers killed and stopped at chosen places, compared."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.comm.launch import Agent
from shoal.elastic.api import PRELOAD, check_elastic, train_elastic
from shoal.elastic.faults import KINDS, PHASES, Fault
from shoal.errors import UserError, unknown_name
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run
from shoal.train.api import train

if TYPE_CHECKING:
    from torch import nn

APART = 4  # steps from one fault to the next: a lost worker's place should be taken by then
EVERY = 4  # steps between two evaluations and checkpoints, so that faults can happen in these too


@dataclass(frozen=True)
class Survived:
    """What became of one fault."""

    fault: str
    happened: bool
    noticed_s: float | None  # from the fault to the agent's knowledge of it
    recovered_s: float | None  # from the fault to the next committed step
    redone: int | None  # steps that had been begun and were done again
    why: str  # as the event log says it


def usual_faults(workers: int, kinds: Sequence[str] = ("kill", "stop"), phases: Sequence[str] = PHASES) -> list[Fault]:
    """One fault of each kind in each phase, on one rank after the other. Raises UserError for unknown ones.

    Only rank 0 saves, and with little held-out data only the first ranks evaluate."""
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of fault", kind, KINDS, "--kinds")
    for phase in phases:
        if phase not in PHASES:
            raise unknown_name("phase", phase, PHASES, "--phases")
    places = [(kind, phase) for kind in kinds for phase in phases]
    faults = []
    for number, (kind, phase) in enumerate(places):
        rank = 0 if phase in ("evaluating", "saving") else number % workers
        faults.append(Fault("kill" if kind == "kill" else "stop", rank, 3 + APART * number, phase))
    return faults


def rehearse(
    recipe: Recipe,
    plan: Plan,
    faults: Sequence[Fault] = (),
    *,
    steps: int = 0,
    least: int = 1,
    folder: Path | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
    model: "Callable[[], nn.Module] | None" = None,
    data: Any = None,
    agent: Agent | None = None,
) -> dict[str, Any]:
    """Train the recipe twice; what each fault did, and whether the bits are equal.

    Trains as many steps as the faults need, or ``steps`` when those are more. Returns faults (of `Survived`),
    bits_equal, weights_sha256 of both, steps, told_once (every step is in the log once), goodput (seconds of the
    undisturbed run over those of the other), ok. Both runs are kept in ``folder`` if there is one.
    Raises UserError for bad input."""
    faults = list(faults) or usual_faults(plan.workers)
    check_elastic(plan, recipe.shards, least)
    for fault in faults:
        if fault.rank >= plan.workers:
            raise UserError(f"fault {str(fault)!r}: the run has ranks 0 to {plan.workers - 1}.")
    if plan.workers < 2:
        raise UserError("a rehearsal needs at least 2 workers: somebody must survive. Use --workers 2.")
    steps = max(max(fault.step for fault in faults) + 2 * APART, steps)
    report = replace(recipe.report, evaluate_every=EVERY, checkpoint_every=EVERY, sample=False, tensorboard=False)
    recipe = replace(recipe, steps=steps, epochs=0, report=report)
    with (
        nullcontext(folder) if folder else tempfile.TemporaryDirectory(prefix="shoal-chaos-") as place,
        nullcontext(agent) if agent else Agent(PRELOAD) as crew,
    ):
        common: dict[str, Any] = {"progress": progress, "model": model, "data": data, "agent": crew}
        calm = train(recipe, plan, run_dir=Path(place) / "undisturbed", **common)
        rough = train_elastic(recipe, plan, least=least, faults=faults, run_dir=Path(place) / "disturbed", **common)
        events = Run(Path(rough["run_dir"])).events()
    survived = [_survived(fault, events) for fault in faults]
    told = [event["step"] for event in events if event["event"] == "committed"]
    equal = calm["weights_sha256"] == rough["weights_sha256"]
    once = told == list(range(1, steps + 1))
    return {
        "ok": equal and once and all(s.recovered_s is not None for s in survived if s.happened),
        "bits_equal": equal,
        "told_once": once,
        "steps": steps,
        "workers": plan.workers,
        "goodput": calm["seconds"] / rough["seconds"],
        "faults": survived,
        "weights_sha256": {"undisturbed": calm["weights_sha256"], "disturbed": rough["weights_sha256"]},
        "run_dir": str(folder) if folder else None,
    }


def _survived(fault: Fault, events: Sequence[Mapping[str, Any]]) -> Survived:
    for index, event in enumerate(events):
        if event.get("fault") == str(fault):
            later = (e for e in events[index:] if e["event"] in ("recovered", "ended"))
            after = next(later, None)
            noticed = event["noticed_s"]
            if after is None or after["event"] == "ended":  # a worker that was on its way out, or just come
                return Survived(str(fault), True, noticed, None, None, event["why"])
            took = noticed + after["time"] - event["time"]
            return Survived(str(fault), True, noticed, took, after["redone"], event["why"])
    return Survived(str(fault), False, None, None, None, "no worker came to this place")
