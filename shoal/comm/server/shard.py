"""What one server decides: events in, instructions out. It knows neither tensors, sockets nor clocks of the wall.

A worker's *clock* is the number of its pushes that have been applied. The *version* of the shard counts updates.

- Synchronous: a round is summed when every worker has pushed, and applied when every worker has committed: until then
  they may read the sum. What the lowest worker, the lead, has committed counts. Instead of committing, all of them may
  take their pushes back: the round is then open again, and summed anew once all have pushed after that.
- Stale-synchronous with bound s (Ho et al., 2013): a push is applied when it comes; a worker may begin its next step
  while its clock is at most s ahead of the slowest worker's. No bound: asynchronous (Recht et al., 2011).

Workers may join and leave at any time. One that joins starts at the clock of the slowest, one that leaves is no longer
waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Join:
    worker: int


@dataclass(frozen=True)
class Leave:
    worker: int


@dataclass(frozen=True)
class Push:
    """The last bucket of a worker's gradient of step ``clock`` has come."""

    worker: int
    clock: int


@dataclass(frozen=True)
class Commit:
    """A worker wants its push applied, and to begin its next step."""

    worker: int
    clock: int
    stop: bool = False  # it was asked to end the run


@dataclass(frozen=True)
class Retract:
    """A worker takes back its push of a synchronous round whose sum it has seen, and will push again."""

    worker: int
    clock: int


@dataclass(frozen=True)
class Pull:
    """A worker wants the weights once the shard has this version, and its own clock is within the bound."""

    worker: int
    version: int = 0


Event = Join | Leave | Push | Commit | Retract | Pull


@dataclass(frozen=True)
class Welcome:
    worker: int
    clock: int


@dataclass(frozen=True)
class Sum:
    """Finish the sum of the round and tell its norm to these workers."""

    clock: int
    workers: tuple[int, ...]


@dataclass(frozen=True)
class Apply:
    """Update the weights with the push of this worker (synchronous: with the round's mean, as the lead has it)."""

    worker: int
    clock: int


@dataclass(frozen=True)
class Grant:
    """Give the worker the weights, and let it begin a step."""

    worker: int
    clock: int
    version: int
    ahead: int  # steps that its clock is ahead of the slowest worker's: the staleness of the step to come
    last: int  # the step after which all stop; -1 while nobody asked


@dataclass(frozen=True)
class Hold:
    """The worker waits until others have caught up; said once."""

    worker: int


@dataclass(frozen=True)
class Refuse:
    """The event is out of order, and changed nothing."""

    worker: int
    why: str


Instruction = Welcome | Sum | Apply | Grant | Hold | Refuse


class Shard:
    """``bound``: steps a worker may be ahead of the slowest; None means any. ``synchronous``: rounds of all workers.
    ``expected`` workers are waited for from the start, whether they have joined or not."""

    def __init__(self, *, synchronous: bool, bound: int | None = 0, expected: Sequence[int] = ()) -> None:
        self.synchronous, self.bound = synchronous, bound
        self.clocks: dict[int, int] = dict.fromkeys(expected, 0)  # the version vector
        self.version = 0
        self.last = -1
        self._joined: set[int] = set()
        self._pushed: set[int] = set()  # complete pushes that have not been applied
        self._committed: set[int] = set()
        self._summed = False
        self._retracted: set[int] = set()  # have taken back their push of the round, whose sum is no good
        self._waiting: dict[int, int] = {}  # worker -> the version it wants
        self._left_at = 0  # the clock of the last worker that left

    @property
    def slowest(self) -> int:
        return min(self.clocks.values(), default=self._left_at)

    def on(self, event: Event) -> list[Instruction]:
        if isinstance(event, Join):
            return self._join(event.worker)
        if event.worker not in self._joined:
            return [] if isinstance(event, Leave) else [Refuse(event.worker, "has not joined")]
        if isinstance(event, Leave):
            return self._leave(event.worker)
        if isinstance(event, Push):
            return self._push(event)
        if isinstance(event, Commit):
            return self._commit(event)
        if isinstance(event, Retract):
            return self._retract(event)
        if event.worker in self._waiting:
            return [Refuse(event.worker, "waits for weights already")]
        self._waiting[event.worker] = event.version
        return self._released(event.worker)

    def _join(self, worker: int) -> list[Instruction]:
        if worker in self._joined:
            return [Refuse(worker, "has joined already")]
        self._joined.add(worker)
        if worker not in self.clocks:
            self.clocks[worker] = self.version + self._summed if self.synchronous else self.slowest
        return [Welcome(worker, self.clocks[worker])]

    def _leave(self, worker: int) -> list[Instruction]:
        self._left_at = self.slowest
        for group in (self._joined, self._pushed, self._committed, self._retracted):
            group.discard(worker)
        del self.clocks[worker]
        self._waiting.pop(worker, None)
        return [*self._round(), *self._released()]

    def _push(self, event: Push) -> list[Instruction]:
        worker = event.worker
        if event.clock != self.clocks[worker] or worker in self._pushed:
            return [Refuse(worker, f"pushed step {event.clock} where step {self.clocks[worker]} is due")]
        if worker in self._waiting:
            return [Refuse(worker, "pushed while it waits for weights")]
        self._pushed.add(worker)
        return self._round() if self.synchronous else []

    def _commit(self, event: Commit) -> list[Instruction]:
        worker = event.worker
        if event.clock != self.clocks[worker] or worker in self._committed or worker not in self._pushed:
            return [Refuse(worker, f"committed step {event.clock} where a push of {self.clocks[worker]} is due")]
        if not self.open:
            return [Refuse(worker, f"committed step {event.clock}, which others have taken back")]
        self._committed.add(worker)
        if self.synchronous:
            self._waiting[worker] = self.version + 1
            return self._round()
        self._pushed.discard(worker)
        self._committed.discard(worker)
        self.clocks[worker] += 1
        self.version += 1
        self._waiting[worker] = 0
        if event.stop and self.last < 0:
            self.last = max(self.clocks.values()) + 2  # whoever is on the way hears of it before it gets there
        return [Apply(worker, event.clock), *self._released(held=worker)]

    def _retract(self, event: Retract) -> list[Instruction]:
        worker = event.worker
        known = event.clock == self.clocks[worker] == self.version and worker not in self._committed
        seen = self._summed or bool(self._retracted)  # the sum that is taken back
        if not known or not seen or worker not in self._pushed or worker in self._retracted:
            return [Refuse(worker, f"took back step {event.clock} where no sum of step {self.clocks[worker]} is known")]
        self._summed = False
        self._pushed.discard(worker)
        self._retracted.add(worker)
        return self._round()

    @property
    def due(self) -> set[int]:
        """Whose pushes the synchronous round takes."""
        return {worker for worker, clock in self.clocks.items() if clock == self.version}

    @property
    def open(self) -> bool:
        """Pushes may be summed: nobody's is one that the others have taken back."""
        return not self._retracted or self.due <= self._retracted

    def _round(self) -> list[Instruction]:
        """What a synchronous round is ready for."""
        if not self.synchronous:
            return []
        due = self.due
        out: list[Instruction] = []
        if due and not self._summed and due <= self._pushed and self.open:
            self._summed = True
            self._retracted.clear()
            out.append(Sum(self.version, tuple(sorted(due))))
        if due and self._summed and due <= self._committed:
            out.append(Apply(min(due), self.version))
            for worker in due:
                self.clocks[worker] += 1
            self.version += 1
            self._pushed -= due  # one who joined in mid-round may have pushed for the next already
            self._committed -= due
            self._summed = False
            out.extend(self._released())
            out.extend(self._round())
        elif self._summed and not due:  # all who had pushed have left: the round never was
            self._summed = False
            self.version += 1
            out.extend(self._round())
        return out

    def _released(self, held: int | None = None) -> list[Instruction]:
        """Grants to those whose turn has come, lowest worker first; a Hold for ``held`` when it must wait."""
        out: list[Instruction] = []
        for worker, version in sorted(self._waiting.items()):
            ahead = self.clocks[worker] - self.slowest
            within = self.synchronous or self.bound is None or ahead <= self.bound
            if version <= self.version and within:
                out.append(Grant(worker, self.clocks[worker], self.version, ahead, self.last))
            elif worker == held:
                out.append(Hold(worker))
        for instruction in out:
            if isinstance(instruction, Grant):
                del self._waiting[instruction.worker]
        return out
