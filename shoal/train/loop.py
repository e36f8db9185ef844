"""The training loop of a recipe, as each worker runs it."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.comm.group import Group
from shoal.comm.status import Phase
from shoal.data.description import describe
from shoal.data.registry import open_data
from shoal.data.source import Splits
from shoal.errors import UserError
from shoal.models.registry import task_for
from shoal.models.task import Task
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run
from shoal.run.tensorboard import TensorBoardLog
from shoal.train.attempt import carried_out
from shoal.train.checkpoint import Checkpoint, load
from shoal.train.evaluation import evaluate
from shoal.train.first_batch import prepare_memory, subject_of
from shoal.train.first_model import in_shared_memory, model_to_place, model_with
from shoal.train.optimizers import make_optimizer
from shoal.train.precision import autocast, settled
from shoal.train.rebatching import BatchPolicy
from shoal.train.sampling import sample_text, writes_text
from shoal.train.states_choice import told_states
from shoal.train.step import Step
from shoal.train.worker import Worker


@dataclass(frozen=True)
class Order:
    """What a run is asked to do; the same on every worker."""

    recipe: Recipe
    plan: Plan
    origins: Mapping[str, str] = field(default_factory=dict)
    run_dir: Path | None = None
    resume: bool = False  # go on from the newest whole checkpoint in run_dir
    model: Callable[[], nn.Module] | None = None  # instead of the recipe's own
    data: Any = None  # instead of the recipe's own: Splits, or a map-style training set
    observe: Callable[[Worker, Step], None] | None = None  # called on every worker after each committed step
    start: Path | None = None  # begin a new run with a checkpoint of another one


def run_recipe(group: Group, order: Order) -> dict[str, Any]:
    """Train to the end, or until asked to stop; the result, on every worker."""
    group.report(Phase.building)
    worker = worker_of(group, order.plan, order.recipe)
    recipe, why = settled(order.recipe, worker)
    splits = open_splits(group, order)
    parts = order.plan.splits_model or in_shared_memory(order.plan, group, worker.device)
    made, first = model_to_place(order, splits, parts=parts)
    task = task_for(recipe.model, splits.train.facts)
    subject = subject_of(recipe, splits, task, worker.device, first) if parts else None
    model = worker.model(made, compile=recipe.model.compile, subject=subject)
    task = worker.held.task or task
    worker.optimizer(make_optimizer(recipe.optimizer, made, recipe.optimizer.lr))
    origins = {**order.origins, "precision": why} if why else dict(order.origins)
    order = replace(order, recipe=recipe, origins=origins)
    with worker.memory.explaining():
        prepare_memory(worker, recipe, splits, task, model)
        run = _agree_on_run(group, order)
        with run.held(group.rank == 0):
            return Loop(worker, order, run, splits, task, model).train()


def worker_of(group: Group, plan: Plan, recipe: Recipe) -> Worker:
    return Worker(
        group,
        plan,
        shards=recipe.shards,
        micro_batches=recipe.micro_batches,
        seed=recipe.seed,
        clip=recipe.clip,
        measures=recipe.batching.policy != "fixed",
    )


def open_splits(group: Group, order: Order) -> Splits:
    """Rank 0 first: what it prepares and caches, the others only map. Raises UserError when there is no sample."""
    prepares = order.data is None
    if prepares and group.rank:
        group.gather(b"")
    splits = open_data(order.recipe.data, order.recipe.seed, order.data)
    if prepares and group.rank == 0:
        group.gather(b"")
    if len(splits.train) == 0:
        raise UserError(f"the training data in {order.recipe.data.path!r} holds no sample.")
    return splits


def _agree_on_run(group: Group, order: Order) -> Run:
    """Rank 0 makes the run directory, once everything else is known to be in order."""
    digests = group.gather(order.recipe.arithmetic_hash.encode())
    if any(digest != digests[0] for digest in digests):
        raise UserError("the workers were started with different recipes: give every host the same one.")
    told = b""
    if group.rank == 0:
        if order.resume:
            assert order.run_dir is not None
            run = Run(order.run_dir.absolute())  # its inputs are written once the checkpoint has been accepted
        else:
            run = Run.create(order.recipe, order.plan, order.origins, order.run_dir)
        told = str(run.path).encode()
    return Run(Path(group.gather(told)[0].decode()))


class Loop:
    """One worker's run of a recipe, from its first step to its result."""

    def __init__(
        self,
        worker: Worker,
        order: Order,
        run: Run,
        splits: Splits,
        task: Task,
        model: nn.Module,
    ) -> None:
        self.worker, self.order, self.recipe, self.run = worker, order, order.recipe, run
        self.splits, self.task, self.model = splits, task, model
        recipe = order.recipe
        self.batching = BatchPolicy(recipe, len(splits.train))
        self.log = run.open_log() if worker.rank == 0 else None
        self.board = TensorBoardLog(run.path / "tensorboard") if recipe.report.tensorboard and self.log else None
        self.best, self.samples = math.inf, 0
        self.untold: dict[int, dict[str, Any]] = {}  # of committed steps that not all workers have done
        self.loss = math.nan
        self.figures: dict[str, float] = {}
        self.write_problem = self.log_problem = ""
        self.checkpoint: str | None = None

    @property
    def steps(self) -> int:
        """Of the run, as far as it is known."""
        return self.batching.steps

    def tell(self, event: str, **fields: Any) -> None:
        if self.log is None:
            return
        try:
            self.log.write(event, **fields)
        except OSError as error:
            self._warn_of_log(error)
        told = {"time": time.time(), "event": event, **fields}
        if self.board:
            self.board.write(told)
        self.worker.group.emit({**told, "run_dir": str(self.run.path)})

    def _warn_of_log(self, error: OSError) -> None:
        """A full disk costs the log, not the training."""
        if not self.log_problem:
            self.log_problem = error.strerror or str(error)
            line = f"shoal: cannot write {str(self.run.path / 'events.jsonl')!r}: {self.log_problem}; training goes on."
            print(line, file=sys.stderr, flush=True)

    def train(self) -> dict[str, Any]:
        worker, recipe = self.worker, self.recipe
        if self.order.resume:
            self._resume()
        elif self.order.start is not None:
            self._branch(self.order.start)
        self._tell_start()
        first = worker.step + 1
        begun = last = time.perf_counter()
        for step in worker.steps(self.splits.train, batch=recipe.batch, **self.batching.length):
            rate = self._do(step)
            self._committed(step, rate, time.perf_counter() - last)
            if step.number == first:
                self._after_first()
            self._after(step.number, step.last_of_epoch)
            last = time.perf_counter()  # evaluation and checkpoints are told on their own
        return self._end(time.perf_counter() - begun)

    def _do(self, step: Step) -> float:
        """One whole step; its learning rate."""
        rate = self.batching.rate(self.worker, step.number)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        why, cost_s = carried_out(step, partial(self._try, step), self.worker, self.run.checkpoints)
        if why:
            self.tell("replayed", step=step.number, why=why, cost_s=cost_s)
        if self.order.observe:
            self.order.observe(self.worker, step)
        return rate

    def _try(self, step: Step) -> None:
        with autocast(self.recipe.precision, self.worker.device):  # around all: each weight is cast once a step
            step.run(self.model, self.task)
        step.commit(wait=self.order.observe is not None)

    def _after_first(self) -> None:
        """What can be done only once the optimiser has its state and a resumed run has been accepted."""
        self.worker.prepare_to_save(self.run.checkpoints, keep=self.recipe.report.keep)
        if self.order.resume and self.log:
            self.run.write_inputs(self.recipe, self.order.plan, self.order.origins)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.worker._optimizer
        assert optimizer is not None
        return optimizer

    def _tell_start(self) -> None:
        if self.log is not None:
            self.run.keep_data(describe(self.splits.train))
        worker, recipe = self.worker, self.recipe
        self.tell(
            "started",
            step=worker.step,
            workers=worker.world,
            placement=[len(owned) for owned in worker.plan.owned(recipe.shards)],
            host=worker.group.host,
            device=str(worker.device),
            threads=recipe.threads,
            precision=recipe.precision,
            parameters=worker.held.elements,
            recipe_hash=recipe.arithmetic_hash,
            torch=torch.__version__,
            steps=self.steps,
            transport=worker.transport,
            **({"memory": worker.memory.started} if worker.memory.started else {}),
            **told_states(worker.plan, self.order.origins),
            **({"split": worker.held.split()} if worker.plan.splits_model else {}),
            **({"lossy": worker.plan.lossy} if worker.plan.lossy else {}),
        )

    def _resume(self) -> None:
        found = self.worker.resume(self.run.checkpoints)
        if found is None:
            why = "; ".join(f"{path.name}: {reason}" for path, reason in self.worker.skipped)
            raise UserError(
                f"no whole checkpoint in {str(self.run.checkpoints)!r}{f' ({why})' if why else ''}: "
                f"train from the start in another run directory."
            )
        self._go_on_from(found, self.run.path)
        self.tell(
            "resumed",
            step=found.step,
            checkpoint=str(self.worker.resumed_from),
            skipped=[{"path": str(path), "why": why} for path, why in self.worker.skipped],
            **({"lossy": "what was left unsent before is lost"} if self.worker.unsent.lost else {}),
        )

    def _branch(self, start: Path) -> None:
        found = load(start)
        self.worker.restore(found)
        self._go_on_from(found, start.parents[1])
        self.tell("branched", step=found.step, checkpoint=str(start), **self.batching.branched(self.worker))

    def _go_on_from(self, found: Checkpoint, run: Path) -> None:
        self.batching.take(self.worker, found.facts)
        self.batching.repeat(self.worker, Run(run))
        self.worker.open_ledger(self.splits.train, self.recipe.batch)  # before anything is told or written
        if found.step >= self.steps:
            raise UserError(
                f"the run in {str(run)!r} has done all of its {self.steps} steps: raise --steps or --epochs."
            )
        best = found.facts.get("best_value")  # None: nothing had been evaluated yet
        self.best = math.inf if best is None else best
        self.samples = found.facts.get("seen", 0)

    def _committed(self, step: Step, rate: float, seconds: float) -> None:
        figures = step.figures
        assert figures is not None
        self.loss = figures.loss
        self.samples += step.samples
        for event, fields in self.batching.committed(self.worker, step, seconds).items():
            self.tell(event, step=step.number, **fields)
        if self.log:
            self.untold[step.number] = self._beside(step, rate, seconds)
            self._tell_committed()

    def _beside(self, step: Step, rate: float, seconds: float) -> dict[str, Any]:
        """What is told of a committed step beside its figures; of communication, on rank 0 only."""
        return {
            "epoch": step.epoch,
            "index": step.index,
            "lr": rate,
            "samples": step.samples,
            "seconds": seconds,
            "parts": step.parts,
            **step.beside,
            **({"comm": found} if self.log and (found := self.worker.communication()) else {}),
            **({"memory": took} if (took := self.worker.memory.take_told()) else {}),
        }

    def _tell_committed(self) -> None:
        """Steps that all workers have done; where they may be steps apart, that is known a little later."""
        held = self.worker.held
        ranks = held.ranks(held.shares[0])
        for number, figures, extra in self.worker.told():
            fields = self.untold.pop(number, None)
            if fields is None:
                continue
            self.loss = figures.loss
            self.tell(
                "committed",
                step=number,
                loss=figures.loss,
                grad_norm=figures.norm,
                targets=int(figures.targets),
                waited=dict(zip(ranks, figures.waited, strict=False)),
                **fields,
                **extra,
            )

    def _after(self, step: int, last_of_epoch: bool) -> None:
        """Evaluate and save when it is time."""
        report = self.recipe.report
        ends = step == self.steps or self.worker.stopping
        epoch_ends = last_of_epoch and not self.recipe.steps
        due = step % report.evaluate_every == 0 if report.evaluate_every else epoch_ends
        saves = step % report.checkpoint_every == 0 if report.checkpoint_every else epoch_ends
        if due or saves or ends:
            self.worker.settle()
            self._tell_committed()
        better = False
        if (due or ends) and not self.worker.stopping:
            better = self._evaluate(step)
        if saves or ends or better:
            self._save(step, best=better, final=ends)
        self._collect_written()

    def _evaluate(self, step: int) -> bool:
        """Held-out figures; whether they are the best so far."""
        source = self.splits.validation or self.splits.test
        if source is None or len(source) == 0:
            return False
        begun = time.perf_counter()
        self.figures = evaluate(
            self.worker.group,
            self.worker.held.module,
            self.task,
            source,
            batch=self.recipe.batch,
            precision=self.recipe.precision,
            device=self.worker.device,
            samples=self.recipe.report.evaluate_samples,
            held=self.worker.held,
        )
        split = "validation" if self.splits.validation is not None else "test"
        self.tell("evaluated", step=step, split=split, figures=self.figures, seconds=time.perf_counter() - begun)
        name, direction = self.task.best
        value = self.figures.get(name, math.nan) * (1 if direction == "min" else -1)
        if value < self.best:
            self.best = value
            return True
        return False

    def _save(self, step: int, *, best: bool, final: bool) -> None:
        self.worker.save(
            self.run.checkpoints,
            best=best,
            final=final,
            recipe_hash=self.recipe.arithmetic_hash,
            best_value=self.best if math.isfinite(self.best) else None,
            seen=self.samples,
            figures={k: v for k, v in self.figures.items() if math.isfinite(v)},
            **self.batching.facts(),
        )

    def _collect_written(self) -> None:
        for written in self.worker.written():
            self.write_problem = written.error
            if written.path:
                self.checkpoint = str(written.path)
            self.tell(
                "checkpointed",
                step=written.step,
                path=str(written.path) if written.path else None,
                bytes=written.bytes,
                stall_s=written.stall_s,
                write_s=written.write_s,
                best=written.best,
                why=written.error or "; ".join(written.warnings),
            )

    def _end(self, seconds: float) -> dict[str, Any]:
        worker = self.worker
        worker.group.report(Phase.saving)
        worker.compare_parameters()
        worker.close()
        self._collect_written()
        interrupted = worker.stopping and worker.step < self.steps
        if interrupted:
            self.tell("interrupted", step=worker.step, why="asked to stop")
        elif self.recipe.report.sample:
            self._sample()
        if self.write_problem:
            raise UserError(
                f"the last checkpoint of {str(self.run.path)!r} was not written: {self.write_problem} "
                f"Older ones are untouched; make room and go on with --resume."
            )
        result = {
            "steps": worker.step,
            "loss": self.loss,
            "weights_sha256": worker.weights_sha256,
            "samples": self.samples,
            "seconds": seconds,
            "run_dir": str(self.run.path),
            "figures": self.figures,
            "checkpoint": self.checkpoint,
            "interrupted": interrupted,
        }
        if self.log:
            self.run.write_result(result)
            self.tell("ended", step=worker.step, result=result)
            self.log.close()
        if self.board:
            self.board.close()
        return result

    def _sample(self) -> None:
        model = self.worker.held.module
        if not writes_text(model, self.splits.train.facts):
            return
        if self.worker.plan.splits_model:
            weights = self.worker.weights()
            if self.worker.rank == 0:
                model = model_with(weights, self.order, self.splits).to(self.worker.device)
        if self.worker.rank == 0:
            text = sample_text(model, self.splits.train.facts, self.recipe)
            self.tell("sampled", step=self.worker.step, text=text)
