"""What runs in the processes of a proof: the reference first, then the same recipe under one plan after the other."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shoal.comm.group import Group
from shoal.comm.launch import Agent
from shoal.comm.status import Phase
from shoal.data.registry import open_data
from shoal.errors import RunFailed, UserError
from shoal.models.registry import build, task_for
from shoal.parallel.whole import Whole
from shoal.prove.closeness import Deviations, check_room, deviations, keep, save
from shoal.prove.fingerprint import GRADIENT, MODEL, StepPrint, gradients_of, step_print, training_tensors
from shoal.prove.reference import PlainLoop
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.train.loop import Order, run_recipe
from shoal.train.optimizers import make_optimizer
from shoal.train.precision import measure_precision
from shoal.train.state import model_tensors
from shoal.train.step import Step
from shoal.train.weights import weights_sha256
from shoal.train.worker import Worker

Progress = Callable[[Mapping[str, Any]], None]
FINAL = "reference.safetensors"  # in the folder of a proof
REFERENCE_HANGS_S = 1800.0  # it says where it is once a step, and a step is the work of all workers


@dataclass(frozen=True)
class Subject:
    """What is proved: a recipe, and what stands in for its own model and data."""

    recipe: Recipe
    model: Callable[[], nn.Module] | None
    data: Any


@dataclass(frozen=True)
class Ended:
    """How one worker ended; of the reference, also what is known of the model."""

    weights_sha256: str
    error: float = 0.0  # largest error of a weight tensor against the reference
    tensor: str = ""  # the one with the largest error
    wide: bool = False  # some parameter is float64
    uses: Mapping[str, int] = field(default_factory=dict)  # places in which a pass uses each trained parameter


@dataclass(frozen=True)
class WholeStep:
    """The whole model's tensors after a step, put together on rank 0, where they are not the reference's bits."""

    prints: StepPrint
    deviations: Deviations


@dataclass
class Trial:
    """What is known of a run: by worker, also when it failed on the way."""

    prints: list[list[StepPrint]]  # of what each worker holds
    whole: list[WholeStep] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0


def settle(group: Group, recipe: Recipe) -> Recipe:
    """The recipe with nothing left open, for all runs of a proof."""
    group.report(Phase.building)
    if recipe.precision != "auto":
        return recipe
    return replace(recipe, precision=measure_precision(torch.device("cpu")).precision)


def run_reference(group: Group, subject: Subject, folder: Path, values: bool) -> Ended:
    """In a process of its own: the plain loop. Leaves its last tensors in ``folder``; with ``values`` every step's."""
    group.report(Phase.building)
    recipe, data = subject.recipe, subject.data
    splits = open_data(recipe.data, recipe.seed, data)
    torch.manual_seed(recipe.seed)
    module = subject.model() if subject.model else build(recipe.model, splits.train.facts)
    task = task_for(recipe.model, splits.train.facts)
    optimizer = make_optimizer(recipe.optimizer, module, recipe.optimizer.lr)
    loop = PlainLoop(recipe, splits.train, module, task, optimizer)
    for step in loop.steps():
        group.report(Phase.forward, step=step.number)
        tensors = gradients_of(module) | training_tensors(module, optimizer)
        if values:
            if step.number == 1:
                check_room(folder, tensors, recipe.steps)
            keep(folder, step.number, tensors)
        shares = {f"{GRADIENT}/{name}": share for name, share in zip(loop.names, step.shares, strict=True)}
        group.emit(replace(step_print(step.number, step.losses, tensors), shares=shares))
    tensors = training_tensors(module, optimizer)
    save(folder / FINAL, tensors)
    return Ended(
        weights_sha256(model_tensors(module)),
        wide=any(p.dtype == torch.float64 for p in module.parameters()),
        uses=dict(zip(loop.names, loop.uses, strict=True)),
    )


def run_and_compare(group: Group, order: Order, folder: Path, losses: Sequence[Sequence[float]]) -> Ended:
    """In every worker: train as any run does, tell the fingerprints, and measure the end against the reference's.

    ``losses``: the reference's, by step and shard."""
    held: dict[str, Tensor] = {}
    gather: list[Whole] = []
    plan = order.plan
    kinds = (MODEL,) if plan.shards_states else (GRADIENT, MODEL)  # of gradients each worker has slices

    def observe(worker: Worker, step: Step) -> None:
        assert step.figures is not None
        optimizer = worker._optimizer
        assert optimizer is not None
        if plan.shards_states:
            worker.settle()
            worker._fetch()  # rank 0 has all states for now
        gradients, module = gradients_of(worker.held.module), worker.held.module
        own = training_tensors(module, optimizer)
        found = step.figures.leaf_losses
        group.emit(step_print(step.number, found, gradients | own))
        if by_value(plan):
            whole = gathered(worker, gradients) if plan.splits_model else gradients | own
            if group.rank == 0:
                apart = deviations(folder, step.number, whole, losses[step.number - 1], found, kinds)
                group.emit(WholeStep(step_print(step.number, found, whole), apart))
        held.update(own)

    def gathered(worker: Worker, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a model that is split, on rank 0; {} elsewhere. All workers call it together."""
        if not gather:
            gather.append(Whole(worker.held, worker.device))
        found = gather[0].gather(gradients, {name: name.partition("/")[2] for name in gradients})
        order = [f"{GRADIENT}/{name}" for name in worker.held.sizes]
        whole = {name: found[name] for name in order if name in found}
        return whole | {f"{MODEL}/{name}": tensor for name, tensor in worker.weights().items()}

    result = run_recipe(group, replace(order, observe=observe))
    if not plan.exact:  # the end counts where every bit must be the same
        return Ended(result["weights_sha256"])
    error, tensor = largest_error(held, folder / FINAL, parts=plan.splits_model)
    return Ended(result["weights_sha256"], error, tensor)


def by_value(plan: Plan) -> bool:
    """Whether a plan is held to a tolerance: it adds up in another order than the reference."""
    return not plan.exact and not plan.lossy


def largest_error(tensors: Mapping[str, Tensor], reference: Path, *, parts: bool = False) -> tuple[float, str]:
    """(error, name) of the weight tensor farthest from the reference's; inf where one is missing or not finite.

    The error of a tensor is its largest deviation over the reference's largest element. ``parts``: only some of the
    model's tensors are here."""
    worst = (0.0, "")
    with safe_open(reference, framework="pt") as file:
        names = [name for name in dict.fromkeys((*file.keys(), *tensors)) if name.startswith(f"{MODEL}/")]
        known = set(file.keys())
        for name in names:
            if parts and name not in tensors:
                continue
            error = _error(tensors[name], file.get_tensor(name)) if name in known and name in tensors else math.inf
            worst = max(worst, (error, name))
    return worst


def _error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel() or torch.equal(found.cpu(), wanted):
        return 0.0
    deviation = float((found.detach().cpu().double() - wanted.double()).abs().max())
    if not math.isfinite(deviation):
        return math.inf
    scale = float(wanted.double().abs().max())
    return deviation / scale if scale else deviation


def launch_reference(agent: Agent, subject: Subject, folder: Path, *, values: bool) -> Trial:
    trial = Trial([[]])
    begun = time.perf_counter()
    trial.ended = agent.run(
        run_reference,
        (subject, folder, values),
        workers=1,
        threads=subject.recipe.threads,
        hang_after_s=REFERENCE_HANGS_S,
        listen=lambda rank, message: trial.prints[rank].append(message),
    )
    trial.seconds = time.perf_counter() - begun
    return trial


def launch_plan(
    agent: Agent, subject: Subject, plan: Plan, run_dir: Path, reference: Trial, progress: Progress | None
) -> Trial:
    """Run the subject under a plan; a run that fails is a trial too. The reference's files lie beside ``run_dir``."""
    trial = Trial([[] for _ in range(plan.workers)])

    def listen(rank: int, message: Any) -> None:
        if isinstance(message, StepPrint):
            trial.prints[rank].append(message)
        elif isinstance(message, WholeStep):
            trial.whole.append(message)
        elif progress:
            progress(message)

    order = Order(subject.recipe, plan, run_dir=run_dir, model=subject.model, data=subject.data)
    losses = [prints.losses for prints in reference.prints[0]]
    begun = time.perf_counter()
    try:
        trial.ended = agent.run(
            run_and_compare,
            (order, run_dir.parent, losses),
            workers=plan.workers,
            servers=plan.server_processes,
            threads=subject.recipe.threads,
            hang_after_s=plan.hang_after_s,
            listen=listen,
        )
    except (RunFailed, UserError) as failed:  # some of what cannot be is found out by the workers alone
        trial.failure = str(failed)
    trial.seconds = time.perf_counter() - begun
    return trial
