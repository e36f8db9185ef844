"""What a schedule will cost: verified, simulated, and set beside the theory and other schedules."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import UserError
from shoal.parallel.schedules.actions import SENDS
from shoal.parallel.schedules.activations import Peak, peak_activations
from shoal.parallel.schedules.formulas import bubble
from shoal.parallel.schedules.registry import MAKERS, make_schedule
from shoal.parallel.schedules.schedule import Schedule
from shoal.parallel.schedules.simulation import Timeline, Times, simulate
from shoal.parallel.schedules.verification import verify

Passes = tuple[float, float, float]  # F, I and W


@dataclass(frozen=True)
class Costs:
    """Of one micro-batch. One entry is a worker's share, spread evenly over its chunks; several are the chunks."""

    passes: tuple[Passes, ...] = ((1.0, 1.0, 1.0),)
    link: float = 0.0  # of a message, in the unit of the passes
    full: float = 1.0  # activations of a worker's share, until the gradient of its input is made
    kept: float = 1.0  # and from then until the gradient of its weights is

    def times(self, schedule: Schedule) -> Times:
        """Raises UserError for another number of chunks."""
        share = schedule.workers / schedule.chunks
        if len(self.passes) == 1:
            rows = [tuple(seconds * share for seconds in self.passes[0])] * schedule.chunks
        elif len(self.passes) == schedule.chunks:
            rows = list(self.passes)
        else:
            raise UserError(
                f"times are given for {len(self.passes)} chunks, and schedule {schedule.name!r} has {schedule.chunks}: "
                f"give F,I,W for each of them, or once for every worker's share."
            )
        forward, backward_input, backward_weight = zip(*rows, strict=True)
        return Times(forward, backward_input, backward_weight, self.link)


@dataclass(frozen=True)
class Prediction:
    """Of a schedule that has passed its verification."""

    timeline: Timeline
    theory: float | None  # the bubble by formula, where one holds: passes of equal length, messages of none
    pairs: tuple[Peak, ...]  # by worker: the most (chunk, micro-batch) pairs with activations
    sizes: tuple[Peak, ...]  # by worker: the same in the unit of the costs
    messages: int  # of one step, over all workers

    @property
    def schedule(self) -> Schedule:
        return self.timeline.schedule


def predict(schedule: Schedule, costs: Costs | None = None) -> Prediction:
    """Raises UserError for what `verify` refuses, and for costs of another number of chunks."""
    given = costs or Costs()
    verified = verify(schedule)
    share = schedule.workers / schedule.chunks
    sizes = peak_activations(schedule, [given.full * share] * schedule.chunks, [given.kept * share] * schedule.chunks)
    equal = len(given.passes) == 1 and len(set(given.passes[0])) == 1 and not given.link
    theory = None
    if equal and schedule.name in MAKERS:
        theory = bubble(schedule.name, schedule.workers, schedule.micro_batches, schedule.chunks // schedule.workers)
    messages = sum(action.kind in SENDS for row in verified.program for action in row)
    return Prediction(simulate(schedule, given.times(schedule)), theory, verified.peaks, sizes, messages)


def predict_all(
    names: Sequence[str], workers: int, micro_batches: int, chunks: int = 1, costs: Costs | None = None
) -> tuple[Prediction, ...]:
    """``chunks`` is for those schedules that take any number; the others have their own."""
    made = []
    for name in names:
        own = name in MAKERS and MAKERS[name].chunks is not None
        made.append(predict(make_schedule(name, workers, micro_batches, 1 if own else chunks), costs))
    return tuple(made)
