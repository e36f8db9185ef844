"""What a program calls: train, launch, evaluate, export. The command line calls the same."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cluster.detect import launched_workers, memory_bytes, usable_cores
from shoal.comm.launch import Agent
from shoal.errors import ShoalError, UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run
from shoal.train.able import check_batching, check_trainable
from shoal.train.notices import Notice, drains, handled
from shoal.train.states_choice import settled_states

if TYPE_CHECKING:
    from torch import nn

    from shoal.comm.distributed import DistributedGroup
    from shoal.comm.group import Group
    from shoal.train.loop import Order

Event = Mapping[str, Any]
PRELOAD = ("shoal.train.loop", "torch._dynamo")  # the latter comes with the first optimiser that is made


def train(
    recipe: Recipe,
    plan: Plan | None = None,
    *,
    origins: Mapping[str, str] | None = None,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    start: str | None = None,
    progress: Callable[[Event], None] | None = None,
    model: "Callable[[], nn.Module] | None" = None,
    data: Any = None,
    agent: Agent | None = None,
    notice: Notice | None = None,
) -> dict[str, Any]:
    """Train a recipe under a plan and return the result: steps, loss, weights_sha256, samples, seconds, run_dir, ...

    Starts ``plan.workers`` processes on this host, or joins those that torchrun started. ``model`` (a function that
    returns a module) and ``data`` (Splits, or any map-style training set) stand in for what the recipe names.
    ``resume``: a run directory to go on with; ``start``: "RUN@STEP", a checkpoint that a new run begins with.
    ``agent``: use this one's processes, for many runs in a row.
    Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 save and return a result with "interrupted", and so does what ``notice`` names;
    the same signal again ends at once.
    Raises UserError for bad input and RunFailed when a worker raised, died or hung."""
    from shoal.train.loop import run_recipe

    joins = launched_workers()
    if joins is not None and notice is not None:
        raise UserError(
            "--notice and --grace are carried out by the launcher of shoal's own workers, and torchrun is another one: "
            "leave them out, or start the run without torchrun."
        )
    plan = plan or Plan(mesh={"data": joins or 1})
    plan.owned(recipe.shards)  # refused before anything is spent
    check_trainable(plan, recipe)
    order = order_of(recipe, plan, origins, run_dir, resume, start, model, data, joined=joins is not None)
    plan = order.plan
    if plan.splits_model:
        from shoal.train.legality import check_split

        check_split(recipe, plan, model, data, room=None if joins is not None else memory_bytes())
    if joins is not None:
        return _train_joined(order, progress)
    seen: list[Path] = []

    def listen(_: int, event: Any) -> None:
        seen[:] = [Path(event["run_dir"])]
        stop.heard(event)
        if progress:
            progress(event)

    with nullcontext(agent) if agent else Agent(PRELOAD) as crew:
        try:
            with drains(notice) as stop:
                results = crew.run(
                    run_recipe,
                    (order,),
                    workers=plan.workers,
                    threads=recipe.threads,
                    hang_after_s=plan.hang_after_s,
                    servers=plan.server_processes,
                    listen=listen,
                    on_start=stop.reach,
                )
        except ShoalError as error:
            tell_failure(seen, error)
            raise
    result: dict[str, Any] = results[0]
    return result


def order_of(
    recipe: Recipe,
    plan: Plan,
    origins: Mapping[str, str] | None,
    run_dir: str | Path | None,
    resume: str | Path | None,
    start: str | None,
    model: "Callable[[], nn.Module] | None",
    data: Any,
    *,
    elastic: bool = False,
    joined: bool = False,
) -> "Order":
    """What workers are told, from what a caller says: see `train`. Raises UserError where a run is not to be found."""
    from shoal.train.loop import Order

    folder = Path(run_dir) if run_dir is not None else None
    folder = Run.find(resume).path if resume is not None else folder
    Run.check_place(folder)
    check_batching(recipe, plan)
    begins = _start_of(start, resume, recipe.steps)
    plan, told = settled_states(plan, recipe, elastic=elastic, joined=joined, foreign=model is not None)
    return Order(recipe, plan, {**(origins or {}), **told}, folder, resume is not None, model, data, start=begins)


def _start_of(start: str | None, resume: str | Path | None, steps: int) -> Path | None:
    """The checkpoint that a new run of ``steps`` (0: not known yet) begins with. Raises UserError."""
    if start is None:
        return None
    if resume is not None:
        raise UserError("give --resume or --from, not both: --from makes a new run.")
    from shoal.train.branching import find_start

    return find_start(start, steps)


def _train_joined(order: "Order", progress: Callable[[Event], None] | None) -> dict[str, Any]:
    from shoal.train.loop import run_recipe

    seen: list[Path] = []

    def listen(event: Any) -> None:
        seen[:] = [Path(event["run_dir"])]
        if progress:
            progress(event)

    with _joined(order.plan, order.recipe.threads) as group:
        group.listen(listen)
        try:
            return run_recipe(group, order)
        except ShoalError as error:
            tell_failure(seen, error)
            raise


def tell_failure(seen: list[Path], error: ShoalError) -> None:
    """The event log of a run that failed says why, with the trace of the first cause."""
    if seen and seen[0].exists():
        with suppress(OSError):  # a full disk may be what it failed of
            log = Run(seen[0]).open_log()
            log.write("failed", why=str(error), trace="\n".join(getattr(error, "__notes__", [])))
            log.close()


def evaluate(
    target: str | Path,
    *,
    split: str = "",
    workers: int | None = None,
    progress: Callable[[Event], None] | None = None,
    agent: Agent | None = None,
) -> dict[str, Any]:
    """The task's own figures of a run or a checkpoint: run_dir, step, split, samples, figures.

    ``split`` is "train", "validation" or "test"; "" takes the test set if there is one, else what was held out.
    Raises UserError when the run, the checkpoint or the split is not there."""
    from shoal.train.scoring import find_target, score

    found = find_target(target)
    recipe = found.run.recipe
    with nullcontext(agent) if agent else Agent(PRELOAD) as crew:
        figures: dict[str, Any] = crew.run(
            score, (found, split), workers=workers or usable_cores(), threads=recipe.threads
        )[0]
    if progress:
        progress({"event": "evaluated", "time": time.time(), "seconds": 0.0, **figures})
    return figures


def export(target: str | Path, folder: str | Path) -> Path:
    """Write the model of a run or a checkpoint as a Hugging Face folder (bert and gpt); returns the folder.

    Raises UserError when the model has no such form or the folder cannot be written."""
    from shoal.train.scoring import export_target, find_target

    export_target(find_target(target), Path(folder))
    return Path(folder)


def launch(
    main: "Callable[..., Any]",
    *arguments: Any,
    workers: int | None = None,
    shards: int = 8,
    micro_batches: int = 1,
    seed: int = 0,
    clip: float = 0.0,
    threads: int = 1,
    plan: Plan | None = None,
) -> Any:
    """Run ``main(worker, *arguments)`` in every worker; what rank 0 returned.

    Starts ``workers`` processes (default: one a core, at most one a shard), also from a notebook; inside torchrun it
    joins as the worker that this process is. ``shards``, ``micro_batches``, ``seed``, ``clip`` and ``threads`` fix the
    arithmetic, as in a Recipe. Raises what `train` raises; KeyboardInterrupt after an interrupted run has ended."""
    joins = launched_workers()
    plan = plan or Plan(mesh={"data": workers or joins or min(usable_cores(), shards)})
    plan.owned(shards)
    check_trainable(plan)
    settings = {"shards": shards, "micro_batches": micro_batches, "seed": seed, "clip": clip}
    if joins is not None:
        with _joined(plan, threads) as group:
            return _as_worker(group, main, arguments, plan, settings)
    with Agent(PRELOAD) as agent, drains() as stop:
        result = agent.run(
            _as_worker,
            (main, arguments, plan, settings),
            workers=plan.workers,
            threads=threads,
            hang_after_s=plan.hang_after_s,
            servers=plan.server_processes,
            on_start=stop.reach,
        )[0]
    if stop.asked:
        raise KeyboardInterrupt  # the loop ended early, and saved what it saves: the program must not go on
    return result


def _as_worker(
    group: "Group", main: "Callable[..., Any]", arguments: tuple[Any, ...], plan: Plan, settings: dict[str, Any]
) -> Any:
    from shoal.train.worker import Worker

    worker = Worker(group, plan, **settings)
    try:
        with worker.memory.explaining():
            result = main(worker, *arguments)
        if worker.step:
            worker.compare_parameters()
        return result
    finally:
        worker.close()


@contextmanager
def _joined(plan: Plan, threads: int) -> "Iterator[DistributedGroup]":
    """Membership in the group that torchrun started; SIGTERM and Ctrl-C stop after the step in flight."""
    import torch

    from shoal.comm.distributed import DistributedGroup

    world = launched_workers()
    if plan.workers != world:
        raise UserError(f"the plan has {plan.workers} workers, but WORLD_SIZE says {world}: leave the number out.")
    torch.set_num_threads(threads)
    group = DistributedGroup(plan.hang_after_s, accelerator=plan.device != "cpu" and torch.cuda.is_available())
    try:
        with handled(lambda *_: group.ask_stop()):
            yield group
    finally:
        group.close()
