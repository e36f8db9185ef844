"""Fault rehearsal: the same recipe undisturbed, and with faults at chosen places, compared step by step."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.comm.launch import Agent
from shoal.elastic.api import PRELOAD, check_elastic, train_elastic
from shoal.elastic.faults import KINDS, PHASES, UPDATED, Fault, is_phase
from shoal.errors import UserError, unknown_name
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run
from shoal.run.scratch import scratch_folder
from shoal.train.able import check_repeatable
from shoal.train.api import order_of, train

if TYPE_CHECKING:
    from torch import nn

    from shoal.elastic.host_faults import HostFault

APART = 4  # steps from one fault to the next: a lost worker's place should be taken by then
EVERY = 4  # steps between two evaluations and checkpoints, so that faults can happen in these too
LEADS = ("evaluating", "saving")  # phases that rank 0 is sure to come to
SCRATCH = "shoal-chaos-"  # what folders of rehearsals that are not kept begin with
USUAL: Mapping[str, Sequence[str]] = {  # kind -> where it happens when no phases are named
    "kill": PHASES,
    "stop": ("forward", "exchanging", "updating"),  # each costs two seconds and more until it is noticed
    "thaw": ("backward",),
    "flip": ("forward", UPDATED),
    "nan": ("forward",),
    "skew": ("loading",),
    "fill": ("loading",),
    "tear": ("forward",),
    "rot": ("forward",),
}


@dataclass(frozen=True)
class Survived:
    """What became of one fault."""

    fault: str
    happened: bool
    noticed_s: float | None  # from the fault to somebody's knowledge of it; None: nobody had to
    recovered_s: float | None  # from the fault to the next committed step, or the next whole checkpoint
    redone: int | None  # steps that had been begun and were done again
    why: str  # as the event log says it


def usual_faults(workers: int, kinds: Sequence[str] = KINDS, phases: Sequence[str] = ()) -> list[Fault]:
    """Faults of each kind, one after the other: in each of the phases, or where each kind tells most when there are
    none. Raises UserError for unknown ones.

    Only rank 0 saves, and with little held-out data only the first ranks evaluate."""
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of fault", kind, KINDS, "--kinds")
    for phase in phases:
        if not is_phase(phase):
            raise unknown_name("phase", phase, PHASES, "--phases")
    places = [(kind, phase) for kind in kinds for phase in phases or USUAL[kind]]
    faults, step = [], 3
    for number, (kind, phase) in enumerate(places):
        rank = 0 if phase in LEADS or kind == "fill" else number % workers
        if kind == "skew":
            rank = max(1, rank)  # rank 0 writes times into the log
        faults.append(Fault(kind, rank, step, phase))
        step += APART * (2 if kind in ("tear", "rot", "fill") else 1)
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
    bits_equal (of the weights at the end, and of loss and norm of every step), differs_at (the first step that is not
    equal, None), told_once (every step is in the log once, but for those that a checkpoint took back), notes (what
    cannot be gone on with in the user's own code, and how that is known), steps, weights_sha256 of both, goodput
    (seconds of the undisturbed run over those of the other), ok. Both runs are kept in ``folder`` if there is one.
    Raises UserError for bad input, and KeyboardInterrupt once a run has ended that was asked to stop."""
    check_repeatable(recipe)
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
        nullcontext(folder) if folder else scratch_folder(SCRATCH) as place,
        nullcontext(agent) if agent else Agent(PRELOAD) as crew,
    ):
        common: dict[str, Any] = {"progress": progress, "model": model, "data": data, "agent": crew}
        calm = unstopped(train(recipe, plan, run_dir=Path(place) / "undisturbed", **common))
        where = Path(place) / "disturbed"
        rough = unstopped(train_elastic(recipe, plan, least=least, faults=faults, run_dir=where, **common))
        before, events = Run(Path(calm["run_dir"])).events(), Run(Path(rough["run_dir"])).events()
        survived = [_survived(fault, events) for fault in faults]
        found = judged((calm, rough), (before, events), survived, steps)
        if not found["bits_equal"]:
            why = explained(found["differs_at"], faults, events)
            found["notes"] = [why, *of_the_user(crew, recipe, plan, model, data)]
    return found | {
        "workers": plan.workers,
        "goodput": lasted_s(before) / lasted_s(events),
        "run_dir": str(folder) if folder else None,
    }


def unstopped(result: dict[str, Any]) -> dict[str, Any]:
    """The result of a run that went to its end. Raises KeyboardInterrupt for another one: no further run begins."""
    if result["interrupted"]:
        raise KeyboardInterrupt
    return result


def judged(
    results: tuple[Mapping[str, Any], Mapping[str, Any]],
    logs: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]],
    survived: Sequence[Survived],
    steps: int,
) -> dict[str, Any]:
    """What a rehearsal finds, from results and events of the undisturbed run and of the other one."""
    calm, rough = (result["weights_sha256"] for result in results)
    differs = first_difference(*logs)
    equal = calm == rough and differs is None
    once = told_once(logs[1], steps)
    return {
        "ok": equal and once and all(s.recovered_s is not None for s in survived if s.happened),
        "bits_equal": equal,
        "differs_at": differs,
        "told_once": once,
        "notes": [],
        "steps": steps,
        "faults": survived,
        "weights_sha256": {"undisturbed": calm, "disturbed": rough},
    }


def of_the_user(crew: Agent, recipe: Recipe, plan: Plan, model: Any, data: Any) -> list[str]:
    """What of the user's own code is seen to give two answers to one question."""
    from shoal.elastic.resumable import not_resumable

    order = order_of(recipe, plan, None, None, None, None, model, data)
    found: list[str] = crew.run(not_resumable, (order,), workers=1, threads=recipe.threads)[0]
    return found


# --- what the logs say ----------------------------------------------------------------------------------------------


def lasted_s(events: Sequence[Mapping[str, Any]]) -> float:
    """From the first start to the end: workers that begin anew after all were lost count from then on only."""
    times = {name: [e["time"] for e in events if e["event"] == name] for name in ("started", "ended")}
    return float(times["ended"][-1] - times["started"][0])


def told_once(events: Sequence[Mapping[str, Any]], steps: int) -> bool:
    """Whether steps 1 to ``steps`` were committed one after the other; `resumed` takes back what came after it."""
    done = 0
    for event in events:
        if event["event"] == "resumed":
            if event["step"] > done:
                return False
            done = event["step"]
        elif event["event"] == "committed":
            if event["step"] != done + 1:
                return False
            done += 1
    return done == steps


def first_difference(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> int | None:
    """The first step whose loss or gradient norm is not the same in both logs, to the bit, however often it is told."""
    wanted = {e["step"]: (e["loss"], e["grad_norm"]) for e in before if e["event"] == "committed"}
    wrong = [
        e["step"] for e in after if e["event"] == "committed" and wanted.get(e["step"]) != (e["loss"], e["grad_norm"])
    ]
    return min(wrong, default=None)


def explained(step: int | None, faults: "Sequence[Fault | HostFault]", events: Sequence[Mapping[str, Any]]) -> str:
    """Where the difference comes from, as far as the place of the first one tells."""
    if step is None:
        return "every loss is equal and the weights are not: what the last step did to them depends on who did it"
    earlier = [fault for fault in faults if fault.step <= step]
    where = f"the first step that differs is {step}"
    if not earlier:
        return f"{where}, before any fault: the recipe does not give the same numbers twice. shoal prove says more"
    if any(event["event"] == "resumed" and event["step"] < step for event in events):
        return (
            f"{where}, after workers went on from a checkpoint: something that the model, the data or the optimiser "
            f"keeps is in no parameter, buffer or state_dict, and was lost with the processes"
        )
    return (
        f"{where}, after {str(earlier[-1])!r}: something that changes the numbers is kept by each worker for itself "
        f"(an attribute of the model or the data set, a generator of its own), and a new worker does not have it"
    )


def _survived(fault: Fault, events: Sequence[Mapping[str, Any]]) -> Survived:
    for index, event in enumerate(events):
        if event.get("fault") != str(fault):
            continue
        if event["event"] == "rehearsed":
            return _lived(fault, event["time"] - event["ago_s"], events)
        later = (e for e in events[index:] if e["event"] in ("recovered", "ended"))
        after = next(later, None)
        noticed = event["noticed_s"]
        if after is None or after["event"] == "ended":  # a worker that was on its way out, or just come
            return Survived(str(fault), True, noticed, None, None, event["why"])
        took = noticed + after["time"] - event["time"]
        return Survived(str(fault), True, noticed, took, after["redone"], event["why"])
    return Survived(str(fault), False, None, None, None, "no worker came to this place")


def _lived(fault: Fault, at: float, events: Sequence[Mapping[str, Any]]) -> Survived:
    """Of a worker that lives through it: what was noticed, and when the next good thing happened."""
    found = [event for event in events if event["time"] >= at]

    def first(events: Sequence[Mapping[str, Any]], name: str, **wanted: bool) -> Mapping[str, Any] | None:
        return next((e for e in events if e["event"] == name and all(bool(e[k]) is v for k, v in wanted.items())), None)

    noticed, good = None, first(found, "committed")
    if fault.kind == "nan" and (noticed := first(found, "replayed")):
        good = first(found[found.index(noticed) :], "committed")
    if fault.kind == "fill" and (noticed := first(found, "checkpointed", path=False)):
        good = first(found[found.index(noticed) :], "checkpointed", path=True)
    why = noticed["why"] if noticed else "nothing was lost, so that nothing was to be noticed"
    return Survived(
        str(fault),
        True,
        noticed["time"] - at if noticed else None,
        good["time"] - at if good else None,
        1 if fault.kind == "nan" and noticed else 0,
        why,
    )
