"""A pipeline's step rehearsed for the sake of its memory: every stage at the same time, with one usual micro-batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from shoal.comm.group import HostGroup
from shoal.data.source import Batch
from shoal.memory.rehearsal import Passes
from shoal.memory.table import Moment
from shoal.parallel.held import Held
from shoal.parallel.pipeline.engine import Pipeline
from shoal.parallel.schedules import Action, Kind, Schedule

Within = Callable[[], AbstractContextManager[object]]
AHEAD = 4  # messages to a stage of another host that may be under way: what the pipeline asks of its transport


class _Rehearsal:
    """What the engine asks for: gradients go where autograd puts them, and no further."""

    def __init__(self, batch: Batch, begin_stream: Callable[[], None], forward_done: Callable[[], None]) -> None:
        self._batch, self._begin_stream, self._forward_done = batch, begin_stream, forward_done

    def batch(self, micro_batch: int) -> Batch:
        return self._batch

    def enter_stream(self, micro_batch: int) -> None:
        self._begin_stream()

    def enter(self, chunk: int, micro_batch: int) -> None:
        pass

    def left(self, chunk: int, micro_batch: int, made: Any) -> None:
        self._forward_done()

    def counted(self, micro_batch: int, value: float, count: float) -> None:
        pass

    def backward(self, chunk: int, micro_batch: int, run: Callable[[], None], value: float, count: float) -> None:
        run()


def passes_of_stages(
    held: Held, schedule: Schedule, batch: Batch, begin_stream: Callable[[], None], within: Within
) -> Passes:
    """All passes of a schedule; called by all workers of the pipeline together."""
    pipeline, task = held.pipeline, held.task
    assert pipeline is not None
    assert task is not None

    def run(forward_done: Callable[[], None]) -> None:
        with within():
            pipeline.step(schedule, task, _Rehearsal(batch, begin_stream, forward_done))

    return run


def there_and_back(pipeline: Pipeline) -> Schedule:
    """One micro-batch through all chunks: whatever the run's own schedule is, a CSV of so many micro-batches too."""
    rows: list[list[Action]] = [[] for _ in range(pipeline.group.world)]
    for chunk, worker in enumerate(pipeline.placement):
        rows[worker].append(Action(Kind.FORWARD, chunk, 0))
    for chunk, worker in reversed(list(enumerate(pipeline.placement))):
        rows[worker].append(Action(Kind.BACKWARD, chunk, 0))
    return Schedule("there and back", pipeline.placement, 1, tuple(map(tuple, rows)))


def moments(schedule: Schedule, worker: int) -> tuple[Moment, ...]:
    """What is in flight of a worker's chunks when its backward passes begin, for sure: of a backward pass in two
    halves, what the second needs is not counted. Moments that others exceed are left out."""
    chunks = {chunk: number for number, chunk in enumerate(schedule.chunks_of(worker))}
    now = [0] * len(chunks)
    found: set[Moment] = set()
    for kind, chunk, _, _ in schedule.actions[worker]:
        if kind is Kind.FORWARD:
            now[chunks[chunk]] += 1
        elif kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            found.add(Moment(chunks[chunk], tuple(now)))
            now[chunks[chunk]] -= 1
    return tuple(sorted(each for each in found if not any(_exceeds(other, each) for other in found)))


def smaller_help(held: Held, passes: int) -> bool:
    """Whether twice as many micro-batches, half as large, take less memory: not where all are in flight in any case."""
    if held.pipeline is None:
        return True
    if held.plan.pipeline.schedule.endswith(".csv"):
        return False  # it is for so many micro-batches
    now, then = (held.pipeline.predicted_peak(held.schedule(max(1, passes) * times)).together for times in (1, 2))
    return then < 2 * now


def _exceeds(one: Moment, other: Moment) -> bool:
    more = all(a >= b for a, b in zip(one.flights, other.flights, strict=True))
    return one.chunk == other.chunk and one.flights != other.flights and more


def messages_ahead(pipeline: Pipeline) -> int:
    """How many of a chunk's outputs, and of the gradients of its inputs, may be waiting for their stage at a time,
    beyond what a rehearsal has met: stages of one host read where a message lies, and tell with their next one."""
    return 1 if isinstance(pipeline.group, HostGroup) else AHEAD
