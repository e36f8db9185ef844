"""A batch that changes in the run: the recipe's policy, as each worker carries it out.

All workers have the same facts of a step, of all of them, and so decide the same without asking each other. The state
goes with checkpoints and to newcomers. What step times have decided is in the log, and a run that goes on repeats it up
to the last step that the log has, so that steps done again are the same steps."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shoal.data.ledger import Changes, Ledger
from shoal.errors import UserError
from shoal.recipe.recipe import Recipe
from shoal.run.batches import decided
from shoal.run.run import Run
from shoal.train.goodput import Decision, Goodput, Took
from shoal.train.noise import NoiseScale
from shoal.train.schedules import learning_rate
from shoal.train.step import Step
from shoal.train.worker import Worker

PASSES = ("data", "forward", "backward")  # parts of a step that grow with its samples


class BatchPolicy:
    """``steps``: of the whole run, with the batches that are known by now."""

    def __init__(self, recipe: Recipe, samples: int) -> None:
        """``samples``: of the training set."""
        self.recipe, spec = recipe, recipe.batching
        self._first = Ledger(samples, recipe.batch, recipe.shards, recipe.micro_batches, recipe.seed)
        unit = recipe.shards * recipe.micro_batches
        most = max(recipe.batch, min(spec.largest(recipe.batch), samples // unit * unit))
        self.noise = NoiseScale()
        self.goodput = Goodput(recipe.batch, most, unit) if spec.policy == "goodput" else None
        self._recorded = dict(spec.changes)  # after which step, samples
        self._up_to = 0.0 if spec.policy == "goodput" else math.inf  # the last step of which it is known
        self._why = "as the recipe says"
        self._before: Took | None = None  # the last step, as far as it says how long steps take
        self.steps = self._in_all(spec.changes)

    @property
    def changes(self) -> bool:
        """Whether the batch may change at all."""
        return self.recipe.batching.policy != "fixed"

    @property
    def length(self) -> dict[str, int]:
        """For `Worker.steps`: so many steps stay so many, and so many epochs, whatever the batch."""
        return {"steps": self.recipe.steps} if self.recipe.steps else {"epochs": self.recipe.epochs}

    def _in_all(self, batches: Changes) -> int:
        return self.recipe.steps or replace(self._first, changes=batches).steps_in(self.recipe.epochs)

    def last_save(self, worker: Worker) -> int:
        """The last step after which a checkpoint was due."""
        every = self.recipe.report.checkpoint_every
        if every:
            return worker.step // every * every
        if not self.recipe.epochs:
            return 0
        return worker.step - replace(self._first, changes=worker.batches).position(worker.step)[1]

    def rate(self, worker: Worker, number: int) -> float:
        """The learning rate of step ``number``. Of an epoch's schedule its samples count, not its steps."""
        recipe, ledger = self.recipe, worker.ledger
        if not self.changes:
            return learning_rate(recipe, number, self.steps)
        assert ledger is not None
        at, whole = float(number), float(self.steps)
        if recipe.epochs:
            at = ledger.seen(number - 1) / recipe.batch + 1
            whole = recipe.epochs * ledger.samples / recipe.batch
        return learning_rate(recipe, at, whole) * self._factor(ledger.batch_of(number - 1))

    def _factor(self, batch: int) -> float:
        rule, times = self.recipe.batching.rule_of(self.recipe.optimizer.name), batch / self.recipe.batch
        if rule == "adascale":
            return self.noise.gain(batch, self.recipe.batch) if self.noise.known else 1.0
        return {"sqrt": math.sqrt(times), "linear": times, "none": 1.0}[rule]

    # --- one step ---------------------------------------------------------------------------------------------

    def committed(self, worker: Worker, step: Step, seconds: float) -> dict[str, dict[str, Any]]:
        """After each step, before anything of it is kept: when the next step has another batch, the event that says so,
        by its name."""
        if not self.changes:
            return {}
        ledger, reduction = worker.ledger, worker._reduction
        assert ledger is not None
        assert reduction is not None
        assert step.figures is not None
        passes, gradients = ledger.passes(step.number - 1), reduction.first
        small, compute_s, took_s = gradients.noise.read(gradients.exchange.all_facts, passes)
        gradients.noise.took = sum(step.parts[part] for part in PASSES), seconds
        batch = ledger.batch_of(step.number - 1)
        whole, before = step.samples == batch, self._before
        self._before = None
        if whole:
            self.noise.add(small, step.figures.norm**2, sum(passes), batch)
            most = max(sum(passes[shard] for shard in owned) for owned in worker.plan.owned(self.recipe.shards))
            self._before = Took(batch, worker.world, most, 0.0, 0.0)
        if self.noise.known:
            step.beside["worth"] = self.noise.gain(step.samples, self.recipe.batch)
        found = None
        if self.goodput is not None and before is not None:
            found = self.goodput.committed(before._replace(compute_s=compute_s, seconds=took_s), self.noise)
        if step.number <= self._up_to:
            size = self._recorded.get(step.number)
            found = Decision(size, self._why, None) if size is not None else None
        if found is None or found.batch == batch or step.number >= self.steps:
            return {}
        return {"rebatched": self._rebatch(worker, step.number, batch, found)}

    def _rebatch(self, worker: Worker, step: int, before: int, found: Decision) -> dict[str, Any]:
        rate = self.rate(worker, step)
        worker.rebatch(found.batch)
        if self.goodput is not None:
            self.steps = self._in_all(worker.batches)
        return {
            "batch": found.batch,
            "before": before,
            "lr": self.rate(worker, step + 1),
            "lr_before": rate,
            "rule": self.recipe.batching.rule_of(self.recipe.optimizer.name),
            "noise_scale": self.noise.samples,
            "efficiency": self.noise.efficiency(found.batch, self.recipe.batch),
            "goodput": found.goodput,
            "steps": self.steps,
            "why": found.why,
        }

    # --- handing on -------------------------------------------------------------------------------------------

    def branched(self, worker: Worker) -> dict[str, Any]:
        """What the event `branched` tells of the other run's steps."""
        return {"batches": worker.batches} if worker.batches else {}

    def facts(self) -> dict[str, Any]:
        """What `take` takes, plain values; {} where the batch stays."""
        return {"batching": self._state()} if self.changes else {}

    def _state(self) -> dict[str, Any]:
        return {
            "noise": self.noise.state(),
            "goodput": self.goodput.state() if self.goodput is not None else None,
            "recorded": [list(change) for change in sorted(self._recorded.items())],
            "up_to": self._up_to if math.isfinite(self._up_to) else None,
            "why": self._why,
            "before": list(self._before) if self._before is not None else None,
        }

    def take(self, worker: Worker, facts: Mapping[str, Any]) -> None:
        """The inverse of `facts`, on a worker that has the weights of that step. Raises UserError where the recipe says
        that the batch stays, and it has changed."""
        if not self.changes and worker.batches:
            raise UserError(
                f"the checkpoint's batch has changed to {worker.batches[-1][1]}, and the recipe says that it stays "
                f"{self.recipe.batch}: go on with --batch-policy goodput, or replay:RUN."
            )
        state = facts.get("batching")
        if not self.changes or state is None:
            return
        self.noise = NoiseScale(**state["noise"])
        if self.goodput is not None:
            self.steps = self._in_all(worker.batches)
            if state["goodput"] is not None:
                self.goodput.take(state["goodput"])
                self._recorded = dict(state["recorded"])
                self._up_to, self._why = state["up_to"], state["why"]
        self._before = Took(*state["before"]) if state["before"] is not None else None

    def repeat(self, worker: Worker, run: Run) -> None:
        """Decide as the log of ``run`` says, up to the last step that it has. Called by every worker."""
        if self.goodput is None:
            return
        told = b""
        if worker.rank == 0:
            told = json.dumps(decided(run.events())).encode()
        changes, up_to = json.loads(worker.group.gather(told)[0])
        self._recorded, self._up_to = dict(changes), up_to
        self._why = f"as in the log of {str(run.path)!r}"
