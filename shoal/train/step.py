"""One step of a run, as one worker goes through it."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from shoal.comm.group import Group
from shoal.comm.status import Phase
from shoal.data.ledger import Ledger
from shoal.data.loading import Prefetcher
from shoal.data.source import Batch
from shoal.errors import UserError
from shoal.models.task import Task
from shoal.train.figures import StepFigures
from shoal.train.memory import due
from shoal.train.optimizers import writes_gradients
from shoal.train.reduction import Reduction
from shoal.train.retry import Retry
from shoal.train.stages import StageWork
from shoal.train.step_guard import StepGuard
from shoal.train.streams import enter_stream

if TYPE_CHECKING:
    from shoal.train.synchrony import Update

Place = tuple[int, int, int]  # step, shard, micro-batch


class Crew(Protocol):
    """What a step must know of the worker that it belongs to."""

    group: Group
    device: torch.device
    seed: int
    clip: float
    retry: Retry
    nothing: Batch  # of no samples: what a worker computes whose experts have something to do, and which has not

    @property
    def shards(self) -> Sequence[int]:
        """Those whose passes this worker makes in the step."""


class Step:
    """One step of the run: iterate its micro-batches, call backward once for each, then commit."""

    def __init__(
        self,
        crew: "Crew",
        reduction: Reduction,
        update: "Update",
        ledger: Ledger,
        number: int,
        batches: Prefetcher[Place],
        on_commit: Callable[[StepFigures], None],
    ) -> None:
        """``number`` counts from 0; ``batches`` gives this worker's micro-batches in order."""
        self.number = number + 1  # as committed: the first step is 1
        self.epoch, self.index = ledger.position(number)
        self.committed = False
        self.samples = int(sum(ledger.counts(number)))
        self.last_of_epoch = ledger.ends_epoch(number)
        self.parts = dict.fromkeys(("data", "forward", "backward", "exchange", "update"), 0.0)
        if reduction.held.pipeline is not None:
            self.parts["stages"] = 0.0  # waiting for other stages
        self.figures: StepFigures | None = None
        self.beside: dict[str, Any] = {}  # what is told of it in the log besides
        self._of_stage = [0.0, 0.0, 0.0, 0]  # see the event `committed`
        self._crew, self._reduction, self._update = crew, reduction, update
        self._ledger, self._zero_based, self._batches = ledger, number, batches
        self._on_commit = on_commit
        self._report = crew.group.report
        self._passes = ledger.passes(number)
        self.redoes = reduction.redoes
        self.guard = StepGuard(crew, reduction, ledger, self.number, watches=update.watches)
        self._place: Place | None = None
        self._of_others = False  # the pass is for the tokens that others send to this worker's experts
        self._begin()

    def _begin(self, *, careful: bool = False) -> None:
        self.guard.begin(careful=careful)
        self._report(Phase.loading, step=self.number)
        self._reduction.begin(
            self._passes,
            stop=self._crew.group.stop_asked,
            change=self._report.change_asked,
            votes=self._update.votes,
            careful=careful,
        )
        self._mark = time.perf_counter()

    def again(self) -> None:
        """Start over after `commit` has raised NotFinite; called by all workers."""
        self._reduction.undo()
        self._update.take_back()
        self._crew.retry.end()
        pipeline = self._reduction.held.pipeline
        reads = pipeline is None or pipeline.readers
        work = [
            ((self._zero_based, shard, micro), ids, self.epoch)
            for shard in (self._crew.shards if reads else ())
            for micro, ids in enumerate(self._ledger.shard(self._zero_based, shard))
        ]
        self._batches = self._batches.again(work)
        self._begin(careful=True)

    def __iter__(self) -> Iterator[Batch]:
        mine = sum(self._passes[shard] for shard in self._crew.shards)
        if self._reduction.held.pipeline is not None:
            raise UserError("the stages of a pipeline take micro-batches in the order of its schedule: use step.run.")
        for number in range(mine):
            self._report(Phase.loading)
            self._lap("data")
            self._place, batch = next(self._batches)
            if number == 0:  # the weights have come in while the batch was loaded
                self._lap("data")
                self._update.arrive()
                self._lap("exchange")
            batch = self.to_device(batch)
            self._lap("data")
            _, shard, micro = self._place
            self.enter_stream(shard, micro)
            self._reduction.enter_leaf(shard)
            self._report(Phase.forward, shard=shard)
            yield batch
            if self._place is not None:
                raise UserError(
                    f"step {self.number}: a micro-batch of shard {shard} went by without step.backward(loss)."
                )
        for _ in range(self._reduction.others_passes(self._passes, mine)):
            self._of_others = True
            self._report(Phase.forward)
            yield self._crew.nothing
            if self._of_others:
                raise UserError(f"step {self.number}: a pass without samples went by without step.backward(loss).")
        self._lap("backward")

    def run(self, model: nn.Module, task: Task) -> None:
        """All passes of the step; those of a pipeline in the order of its schedule."""
        held = self._reduction.held
        if held.pipeline is None:
            for batch in self:
                self.backward(*task.loss(model, batch))
            return
        places: list[tuple[int, int] | None] = [
            (shard, micro) for shard in self._crew.shards for micro in range(self._passes[shard])
        ]
        places += [None] * self._reduction.others_passes(self._passes, len(places))
        self._update.arrive()
        if not places:
            return
        work = StageWork(self, self._reduction, places, self._passes, self._batches)
        found = held.pipeline.step(held.schedule(len(places)), task, work)
        self.parts["data"] += work.loading_s
        self.parts["forward"] += found.forward_s - work.loading_s
        self.parts["backward"] += found.backward_s
        self.parts["stages"] += found.waiting_s
        self._of_stage = [found.forward_s + found.backward_s, found.waiting_s, found.seconds, found.peak.together]
        self._mark = time.perf_counter()

    @property
    def nothing(self) -> Batch:
        """A batch of no samples."""
        return self._crew.nothing

    def enter_stream(self, shard: int, micro: int) -> None:
        """Make torch's default generators start at the stream of a micro-batch."""
        enter_stream(self._crew.seed, self._zero_based, shard, micro)

    def to_device(self, batch: Batch) -> Batch:
        if self._crew.device.type == "cpu":
            return batch
        return {name: tensor.to(self._crew.device, non_blocking=True) for name, tensor in batch.items()}

    @property
    def shard(self) -> int:
        """The shard of the current micro-batch."""
        if self._place is None:
            raise UserError("there is no current micro-batch: iterate the step first.")
        return self._place[1]

    def backward(self, loss: Tensor, count: float) -> None:
        """Back-propagate a micro-batch's ``loss``, the SUM over its ``count`` samples or target tokens.

        The mean is taken over the whole step: that is what makes the result independent of the split.
        Raises NotFinite naming shard and sample ids when the loss is not finite, or leaves that to `commit`."""
        run = loss.backward
        with torch.autocast(self._crew.device.type, enabled=False):  # the caller's, if any, is for forward passes
            if self._of_others:
                self._of_others = False
                self._reduction.backward_of_others(run)
                return
            if self._place is None:
                raise UserError(
                    "step.backward was called twice for one micro-batch, or outside of the step's iteration."
                )
            _, shard, micro = self._place
            value = float(loss.detach())
            self.guard.loss(value, shard, micro)
            self._lap("forward")
            self._report(Phase.backward, shard=shard)
            self._place = None
            if micro == self._passes[shard] - 1:
                self._reduction.leave_leaf()
            self._reduction.backward(shard, run, value, float(count), waited_s=self.parts["data"])
        self._lap("backward")

    def commit(self, *, wait: bool = True) -> StepFigures:
        """Wait for the global mean gradient, clip it, update the weights: the step has then happened on all workers.

        Raises NotFinite, a RunFailed, when loss or gradient is not, and Diverged when workers' parameters are not the
        same ones: nothing has been updated then.
        ``wait=False``: weights that come from servers may still be on their way; the next step waits for them."""
        self._report(Phase.exchanging)
        self._lap("backward")
        self._update.arrive()  # a worker without a sample in this step has not waited yet
        trusted = not writes_gradients(self._update.optimizer)
        self.figures = figures = self._reduction.finish(self.guard.differs)
        self.guard.check(figures)
        self._update.rest.check(self._crew.group.rank, self.number)
        self._reduction.hang(figures.norm, self._crew.clip, keep_gradients=trusted)
        self._lap("exchange")
        self._report(Phase.updating)
        self._update.step(self.number, figures)
        self._update.rest.keep(self.number)
        if self._update.votes and not self._update.watches:
            self._reduction.remember()
        if wait:
            self._update.arrive()
        self.committed = True
        self._on_commit(figures)
        if self._reduction.held.pipeline is not None and due(self.number):
            rows = self._crew.group.gather(json.dumps(self._of_stage).encode())
            self.beside["stages"] = [json.loads(row) for row in rows]
        self._reduction.ended()
        self._lap("update")
        return figures

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] += now - self._mark
        self._mark = now
