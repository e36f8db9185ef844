"""What a program calls: train, with workers that may come and go. The command line calls the same."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cluster.detect import launched_workers
from shoal.comm.launch import Agent
from shoal.elastic.autoscale import Autoscale
from shoal.elastic.autoscaled import AutoscaledJob, check_bounds
from shoal.elastic.crew import ElasticJob
from shoal.elastic.faults import MOST, Fault
from shoal.elastic.replan import MOST_SERVERS, MOST_WORKERS
from shoal.errors import ShoalError, UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run
from shoal.train.able import check_trainable
from shoal.train.api import PRELOAD as TRAINS
from shoal.train.api import order_of, tell_failure
from shoal.train.notices import Notice, drains

if TYPE_CHECKING:
    from torch import nn

PRELOAD = (*TRAINS, "shoal.elastic.loop")


def check_elastic(plan: Plan, shards: int, least: int) -> None:
    """Raises UserError for plans that cannot go on with other workers, and for numbers that cannot be."""
    check_trainable(plan)
    plan.owned(shards)
    split = [f"{axis} = {size}" for axis, size in plan.axes.sizes if axis not in ("data", "pipe") and size > 1]
    if split:
        raise UserError(
            f"plan: a mesh with {', '.join(split)} is not elastic yet: use axes 'data' and 'pipe', or leave --elastic "
            f"out."
        )
    if plan.axes.size("pipe") > 1:
        _check_stages(plan)
    if plan.sync == "parameter-server" and plan.staleness:
        raise UserError(
            f"plan: staleness = {plan.staleness} is not elastic yet: use staleness = 0, which keeps the bits, or leave "
            f"--elastic out."
        )
    if plan.sync not in ("exact", "parameter-server") or plan.compression != "none":
        what = f"sync = {plan.sync!r}" if plan.sync != "exact" else f"compression = {plan.compression!r}"
        raise UserError(f"plan: {what} is not elastic yet: leave it out, or leave --elastic out.")
    if plan.state_group:
        raise UserError(f"plan: state_group = {plan.state_group} is not elastic yet: leave it or --elastic out.")
    if plan.memory.budget_bytes:
        raise UserError("plan: memory.peak_bytes is not elastic yet: leave it or --elastic out.")
    if plan.memory.changes_updates and (plan.shards_states or plan.axes.size("pipe") > 1):
        other = f"states = {plan.states!r}" if plan.shards_states else "mesh axis 'pipe'"
        raise UserError(
            f"plan: {plan.memory.changes_updates} with {other} is not elastic yet: leave one of them or --elastic out."
        )
    if plan.placement:
        raise UserError("--elastic deals the shards out evenly over those who are there: leave --placement out.")
    if not 1 <= least <= plan.workers:
        raise UserError(f"--min-workers {least}: it must be from 1 to the {plan.workers} workers that the run has.")
    if plan.workers > MOST_WORKERS or plan.server_processes > MOST_SERVERS:
        raise UserError(
            f"--elastic: {plan.workers} workers and {plan.server_processes} servers on one host: use at most "
            f"{MOST_WORKERS} and {MOST_SERVERS}."
        )
    if launched_workers() is not None:
        raise UserError("--elastic starts its own workers: run it without torchrun, which restarts all of them.")


def _check_stages(plan: Plan) -> None:
    """What names a number of stages, or of workers, does not go on with another one."""
    pipeline = plan.pipeline
    if pipeline.schedule.endswith(".csv") or pipeline.cuts:
        what = f"a schedule from {pipeline.schedule!r}" if not pipeline.cuts else "pipeline.cuts"
        raise UserError(f"plan: {what} is for one number of stages, and --elastic changes it: leave one of them out.")
    if plan.shards_states:
        raise UserError(
            f"plan: states = {plan.states!r} in a pipeline is not elastic yet: use states = 'replicated', or leave "
            f"--elastic out."
        )


def train_elastic(
    recipe: Recipe,
    plan: Plan | None = None,
    *,
    least: int = 1,
    rebalance: bool = False,
    autoscale: Autoscale | tuple[int, int] | None = None,
    origins: Mapping[str, str] | None = None,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    start: str | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
    model: "Callable[[], nn.Module] | None" = None,
    data: Any = None,
    agent: Agent | None = None,
    notice: Notice | None = None,
    faults: Sequence[Fault] = (),
) -> dict[str, Any]:
    """As `shoal.train`, with workers of this host that may be lost, added and taken away while it runs.

    The weights are those of an undisturbed run, to the bit. A lost worker costs its shards of the step in flight, in
    plans that keep the others'; its place is taken by a new one. Below ``least`` workers the run waits, with its state
    in memory. With ``rebalance`` shards move from slow workers to others; without, slow ones are only named in the log.
    With ``autoscale``, a policy or the fewest and the most workers for the usual one, their number follows what steps
    take: see `shoal.elastic.autoscale`. ``faults`` happen to its workers on purpose: see `shoal.elastic.chaos`.
    Raises UserError for bad input and RunFailed when a worker raised, or when workers are lost again and again."""
    import cloudpickle

    from shoal.elastic.loop import run_elastic

    plan = plan or Plan()
    check_elastic(plan, recipe.shards, least)
    if rebalance and (plan.axes.size("pipe") > 1 or plan.server_processes):
        raise UserError("--rebalance moves shards between workers that are all alike: leave it out with this plan.")
    if isinstance(autoscale, tuple):
        autoscale = Autoscale(*autoscale, shards=recipe.shards, cores=max(1, recipe.threads))
    if autoscale is not None:
        check_bounds((autoscale.least, autoscale.most), plan, recipe.shards, least)
    if len(faults) > MOST:
        raise UserError(f"{len(faults)} faults in one run: use at most {MOST}.")
    order = order_of(recipe, plan, origins, run_dir, resume, start, model, data, elastic=True)
    folder = order.run_dir.absolute() if order.run_dir is not None else None
    if folder is not None and not order.resume:
        Run.check_new(folder)
    seen: list[Path] = []

    def listen(_: int, event: Any) -> None:
        seen[:] = [Path(event["run_dir"])]
        stop.heard(event)
        if progress:
            progress(event)

    kind = ElasticJob if autoscale is None else partial(AutoscaledJob, policy=autoscale)
    job = kind(
        code=cloudpickle.dumps((run_elastic, (order,))),
        threads=recipe.threads,
        faults=tuple(faults),
        workers=plan.workers,
        least=least,
        shards=recipe.shards,
        hang_after_s=plan.hang_after_s,
        rebalance=rebalance,
        depth=plan.axes.size("pipe"),
        servers=plan.server_processes,
        outlives=not faults,
        run_dir=folder,
    )
    with nullcontext(agent) if agent else Agent(PRELOAD) as crew:
        try:
            with drains(notice) as stop:
                result: dict[str, Any] = crew.carry_out(job, 1, listen=listen, on_start=stop.reach)[0]
        except ShoalError as error:
            tell_failure(seen, error)
            raise
    return result
