"""What runs in the processes of a proof: the reference first, then the same recipe under one plan after the other."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shoal.comm.group import Group
from shoal.comm.launch import Agent
from shoal.comm.status import Phase
from shoal.data.dataset import DatasetSource
from shoal.data.registry import open_data
from shoal.data.source import Splits
from shoal.errors import RunFailed
from shoal.models.registry import build, task_for
from shoal.prove.fingerprint import StepPrint, step_print, training_tensors
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
REFERENCE_HANGS_S = 1800.0  # it says where it is once a step, and a step is the work of all workers


@dataclass(frozen=True)
class Subject:
    """What is proved: a recipe, and what stands in for its own model and data."""

    recipe: Recipe
    model: Callable[[], nn.Module] | None
    data: Any


@dataclass(frozen=True)
class Ended:
    """How one worker ended."""

    weights_sha256: str
    error: float = 0.0  # largest error of a weight tensor against the reference
    tensor: str = ""  # the one with the largest error


@dataclass
class Trial:
    """What is known of a run: by worker, also when it failed on the way."""

    prints: list[list[StepPrint]]
    ended: list[Ended] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0


def settle(group: Group, recipe: Recipe) -> Recipe:
    """The recipe with nothing left open, for all runs of a proof."""
    group.report(Phase.building)
    if recipe.precision != "auto":
        return recipe
    return replace(recipe, precision=measure_precision(torch.device("cpu")).precision)


def run_reference(group: Group, subject: Subject, final: Path) -> Ended:
    """In a process of its own: the plain loop. Leaves its last tensors in the file ``final``."""
    group.report(Phase.building)
    recipe, data = subject.recipe, subject.data
    if data is None:
        splits = open_data(recipe.data, recipe.seed)
    else:
        splits = data if isinstance(data, Splits) else Splits(DatasetSource(data))
    torch.manual_seed(recipe.seed)
    module = subject.model() if subject.model else build(recipe.model, splits.train.facts)
    task = task_for(recipe.model, splits.train.facts)
    optimizer = make_optimizer(recipe.optimizer, module, recipe.optimizer.lr)
    for step in PlainLoop(recipe, splits.train, module, task, optimizer).steps():
        group.report(Phase.forward, step=step.number)
        group.emit(step_print(step.number, step.losses, module, optimizer))
    tensors = training_tensors(module, optimizer)
    save_file(
        {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, final
    )
    return Ended(weights_sha256(model_tensors(module)))


def run_and_compare(group: Group, order: Order, final: Path) -> Ended:
    """In every worker: train as any run does, tell the fingerprints, and measure the end against the reference's."""
    held: dict[str, Tensor] = {}

    def observe(worker: Worker, step: Step) -> None:
        assert step.figures is not None
        module, optimizer = worker.held.module, worker._optimizer
        assert optimizer is not None
        group.emit(step_print(step.number, step.figures.leaf_losses, module, optimizer))
        held.update(training_tensors(module, optimizer))

    result = run_recipe(group, replace(order, observe=observe))
    error, tensor = largest_error(held, final)
    return Ended(result["weights_sha256"], error, tensor)


def largest_error(tensors: Mapping[str, Tensor], reference: Path) -> tuple[float, str]:
    """(error, name) of the weight tensor farthest from the reference's; inf where one is missing or not finite.

    The error of a tensor is its largest deviation over the reference's largest element."""
    worst = (0.0, "")
    with safe_open(reference, framework="pt") as file:
        names = [name for name in dict.fromkeys((*file.keys(), *tensors)) if name.startswith("model/")]
        known = set(file.keys())
        for name in names:
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


def launch_reference(agent: Agent, subject: Subject, final: Path) -> Trial:
    trial = Trial([[]])
    begun = time.perf_counter()
    trial.ended = agent.run(
        run_reference,
        (subject, final),
        workers=1,
        threads=subject.recipe.threads,
        hang_after_s=REFERENCE_HANGS_S,
        listen=lambda rank, message: trial.prints[rank].append(message),
    )
    trial.seconds = time.perf_counter() - begun
    return trial


def launch_plan(
    agent: Agent, subject: Subject, plan: Plan, run_dir: Path, final: Path, progress: Progress | None
) -> Trial:
    """Run the subject under a plan; a run that fails is a trial too."""
    trial = Trial([[] for _ in range(plan.workers)])

    def listen(rank: int, message: Any) -> None:
        if isinstance(message, StepPrint):
            trial.prints[rank].append(message)
        elif progress:
            progress(message)

    order = Order(subject.recipe, plan, run_dir=run_dir, model=subject.model, data=subject.data)
    begun = time.perf_counter()
    try:
        trial.ended = agent.run(
            run_and_compare,
            (order, final),
            workers=plan.workers,
            servers=plan.server_processes,
            threads=subject.recipe.threads,
            hang_after_s=plan.hang_after_s,
            listen=listen,
        )
    except RunFailed as failed:
        trial.failure = str(failed)
    trial.seconds = time.perf_counter() - begun
    return trial
