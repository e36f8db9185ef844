"""When each action of a schedule begins and ends, given how long the passes take."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import UserError
from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.dependencies import Visit, walk
from shoal.parallel.schedules.schedule import Schedule


@dataclass(frozen=True)
class Times:
    """By chunk, in any one unit. A backward pass in one go takes as long as its two halves."""

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    link: float = 0.0  # from the end of a pass to the start of the next chunk's, on another worker

    @staticmethod
    def equal(chunks: int, forward: float = 1.0, backward_input: float = 1.0, backward_weight: float = 1.0) -> "Times":
        return Times((forward,) * chunks, (backward_input,) * chunks, (backward_weight,) * chunks)

    def of(self, action: Action) -> float:
        """Of a pass; a message takes the link's time."""
        chunk = action.chunk
        if action.kind is Kind.FORWARD:
            return self.forward[chunk]
        if action.kind is Kind.BACKWARD:
            return self.backward_input[chunk] + self.backward_weight[chunk]
        return self.backward_input[chunk] if action.kind is Kind.BACKWARD_INPUT else self.backward_weight[chunk]


@dataclass(frozen=True)
class Timeline:
    """``starts[w][i]`` and ``ends[w][i]`` belong to ``schedule.actions[w][i]``."""

    schedule: Schedule
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    visits: tuple[Visit, ...]  # all actions in an order in which they can be done

    @property
    def span(self) -> float:
        """From the first action of the step to its last one, over all workers."""
        return max(row[-1] for row in self.ends if row)

    def busy(self, worker: int) -> float:
        return sum(self.ends[worker]) - sum(self.starts[worker])

    @property
    def bubble(self) -> float:
        """Share of all workers' time, from the step's start to its end, in which they compute nothing."""
        busy = sum(map(self.busy, range(self.schedule.workers)))
        return 1 - busy / (self.span * self.schedule.workers)

    @property
    def inner_bubble(self) -> float:
        """The bubble of the worker with the longest own span, from its first action to its last one: what is left when
        steps follow each other without a common end (what Qi et al. call the bubble)."""
        spans = [row[-1] - first[0] for row, first in zip(self.ends, self.starts, strict=True)]
        return 1 - max(map(self.busy, range(self.schedule.workers))) / max(spans)


def simulate(schedule: Schedule, times: Times | None = None) -> Timeline:
    """Every worker takes its actions in order, each as soon as its input is there. ``times`` None: all passes take 1.

    Raises UserError for a schedule that deadlocks, and for times of another number of chunks."""
    given = times or Times.equal(schedule.chunks)
    for name in ("forward", "backward_input", "backward_weight"):
        if len(getattr(given, name)) != schedule.chunks:
            raise UserError(f"times: {name} has {len(getattr(given, name))} entries for {schedule.chunks} chunks.")
    starts: list[list[float]] = [[] for _ in schedule.actions]
    ends: list[list[float]] = [[] for _ in schedule.actions]

    visits = walk(schedule)
    for worker, index, giver in visits:
        start = ends[worker][-1] if index else 0.0
        if giver:
            arrival = ends[giver[0]][giver[1]] + (given.link if giver[0] != worker else 0.0)
            start = max(start, arrival)
        starts[worker].append(start)
        ends[worker].append(start + given.of(schedule.actions[worker][index]))
    return Timeline(schedule, _frozen(starts), _frozen(ends), tuple(visits))


def _frozen(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, rows))
