"""One step of a run, as one worker goes through it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from shoal.comm.group import Group
from shoal.comm.status import Phase
from shoal.data.ledger import Ledger
from shoal.data.loading import Prefetcher
from shoal.data.source import Batch
from shoal.errors import RunFailed, UserError
from shoal.train.gradients import Gradients, StepFigures, writes_gradients
from shoal.train.streams import enter_stream

if TYPE_CHECKING:
    from shoal.train.synchrony import Update

COMPARE_EVERY = 50  # steps between two comparisons of all workers' parameters
Place = tuple[int, int, int]  # step, shard, micro-batch


class Crew(Protocol):
    """What a step must know of the worker that it belongs to."""

    group: Group
    device: torch.device
    seed: int
    clip: float

    @property
    def shards(self) -> range: ...


class Step:
    """One step of the run: iterate its micro-batches, call backward once for each, then commit."""

    def __init__(
        self,
        crew: "Crew",
        gradients: Gradients,
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
        self.last_of_epoch = self.index == ledger.steps_per_epoch - 1
        self.parts = dict.fromkeys(("data", "forward", "backward", "exchange", "update"), 0.0)
        self.figures: StepFigures | None = None
        self._crew, self._gradients, self._update = crew, gradients, update
        self._ledger, self._zero_based, self._batches = ledger, number, batches
        self._on_commit = on_commit
        self._report = crew.group.report
        self._report(Phase.loading, step=self.number)
        self._passes = passes_of(ledger, number)
        checksum = 0.0
        if number % COMPARE_EVERY == 0 and update.equal:
            update.arrive()
            checksum = parameter_checksum(gradients.module)
        gradients.begin(self._passes, stop=crew.group.stop_asked, change=self._report.change_asked, checksum=checksum)
        self._place: Place | None = None
        self._mark = time.perf_counter()

    def __iter__(self) -> Iterator[Batch]:
        mine = sum(self._passes[shard] for shard in self._crew.shards)
        for number in range(mine):
            self._report(Phase.loading)
            self._lap("data")
            self._place, batch = next(self._batches)
            if number == 0:  # the weights have come in while the batch was loaded
                self._lap("data")
                self._update.arrive()
                self._lap("exchange")
            if self._crew.device.type != "cpu":
                batch = {k: v.to(self._crew.device, non_blocking=True) for k, v in batch.items()}
            self._lap("data")
            _, shard, micro = self._place
            enter_stream(self._crew.seed, self._zero_based, shard, micro)
            self._gradients.enter_leaf(shard)
            self._report(Phase.forward, shard=shard)
            yield batch
            if self._place is not None:
                raise UserError(
                    f"step {self.number}: a micro-batch of shard {shard} went by without step.backward(loss)."
                )
        self._lap("backward")

    @property
    def shard(self) -> int:
        """The shard of the current micro-batch."""
        if self._place is None:
            raise UserError("there is no current micro-batch: iterate the step first.")
        return self._place[1]

    def backward(self, loss: Tensor, count: float) -> None:
        """Back-propagate a micro-batch's ``loss``, the SUM over its ``count`` samples or target tokens.

        The mean is taken over the whole step: that is what makes the result independent of the split.
        Raises RunFailed naming shard and sample ids when the loss is not finite."""
        if self._place is None:
            raise UserError("step.backward was called twice for one micro-batch, or outside of the step's iteration.")
        _, shard, micro = self._place
        value = float(loss.detach())
        if not math.isfinite(value):
            ids = self._ledger.shard(self._zero_based, shard)[micro].tolist()
            shown = ", ".join(map(str, ids[:32])) + (f", ... ({len(ids)} in all)" if len(ids) > 32 else "")
            raise RunFailed(f"loss is {value} at step {self.number}, shard {shard}, sample ids {shown}")
        self._lap("forward")
        self._report(Phase.backward, shard=shard)
        self._place = None
        ends = micro == self._passes[shard] - 1
        with torch.autocast(self._crew.device.type, enabled=False):  # the caller's, if any, is for forward passes
            self._gradients.backward(shard, loss, value, float(count), leaf_ends=ends, waited_s=self.parts["data"])
        self._lap("backward")

    def commit(self, *, wait: bool = True) -> StepFigures:
        """Wait for the global mean gradient, clip it, update the weights: the step has then happened on all workers.

        ``wait=False``: weights that come from servers may still be on their way; the next step waits for them."""
        self._report(Phase.exchanging)
        self._lap("backward")
        self._update.arrive()  # a worker without a sample in this step has not waited yet
        trusted = not writes_gradients(self._update.optimizer)
        self.figures = figures = self._gradients.finish(self._crew.clip, keep_gradients=trusted)
        self._lap("exchange")
        self._check(figures)
        self._report(Phase.updating)
        self._update.step(self.number, figures)
        if wait:
            self._update.arrive()
        self.committed = True
        self._on_commit(figures)
        self._lap("update")
        return figures

    def _check(self, figures: StepFigures) -> None:
        if not math.isfinite(figures.norm):
            raise RunFailed(
                f"the gradient is not finite at step {self.number} although the loss is ({figures.loss:.6g}): "
                f"{self._gradients.first_not_finite()}"
            )
        compare(figures.checksums, f"before step {self.number}")

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] += now - self._mark
        self._mark = now


def passes_of(ledger: Ledger, step: int) -> tuple[int, ...]:
    """How many backward passes each shard has at a step."""
    return tuple(len(ledger.shard(step, shard)) for shard in range(ledger.shards))


def compare(checksums: Sequence[float], when: str) -> None:
    """Raises RunFailed naming the ranks whose parameters are not those of the most."""
    if len(set(checksums)) > 1:
        usual = max(checksums, key=checksums.count)
        odd = [rank for rank, value in enumerate(checksums) if value != usual]
        raise RunFailed(
            f"the workers' parameters differ {when}: rank {', '.join(map(str, odd))} "
            f"disagree{'s' if len(odd) == 1 else ''} with the others "
            f"(checksums {', '.join(f'{s:.0f}' for s in checksums)})"
        )


@torch.no_grad()
def parameter_checksum(module: nn.Module) -> float:
    """A sum of the parameters' bits, exact in float64: equal on workers whose parameters are equal."""
    total = 0
    for parameter in module.parameters():
        flat = parameter.detach().reshape(-1).contiguous()
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        total += int(flat.view(words).sum(dtype=torch.int64))
    return float(total % (1 << 52))
