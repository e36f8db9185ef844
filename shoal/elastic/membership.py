"""Who trains, decided: events in, instructions out, with neither clock nor process.

A worker of an elastic run sits on a *seat*, a number that is never used again. An *epoch* is a row of seats that train
together; it ends when one of them is lost, or after a step when somebody is to come or to leave. Seats that have left
an epoch say which step they hold; the next epoch starts from the newest step that is held, and a seat that holds less
(it was cut off in the middle of the others' update, or it is new) takes the state from one that holds it.

The shell (`shoal.elastic.crew`) does what is returned, in order. `shoal.elastic.simulation` does it with a virtual
clock and workers that die at every possible place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

FRESH = -1  # the step that a worker holds which has been built and has trained nothing
SPARE_DEATHS = 6  # deaths, beside one a shard, without a committed step between them, before a run gives up; and
# as many new workers, one after the other, that end before they can join: then no more are made


# --- events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """The first seat has opened the data: what it prepared and cached, the others only map."""

    seat: int


@dataclass(frozen=True)
class Ready:
    """A new worker has built its model, which can be cut into so many stages, and can join."""

    seat: int
    deepest: int = 1


@dataclass(frozen=True)
class Left:
    """A member has hung up on all others of its epoch; it holds the weights of ``step``."""

    seat: int
    step: int
    due: bool  # what follows that step (evaluation, checkpoint) is still to be done


@dataclass(frozen=True)
class Went:
    """A member has committed its epoch's first step."""

    seat: int
    epoch: int
    step: int


@dataclass(frozen=True)
class Dead:
    seat: int
    why: str


@dataclass(frozen=True)
class Suspect:
    """A member makes no progress; ``evidence`` says since when, where, and what the others are at."""

    seat: int
    evidence: str


@dataclass(frozen=True)
class Resize:
    workers: int
    why: str


@dataclass(frozen=True)
class Rebalance:
    """A member is slow, and its shards are to move: the same workers go on with others."""

    seat: int
    why: str


@dataclass(frozen=True)
class Drain:
    """A worker is to leave after the step in flight; the run stays smaller by it, but not below its minimum."""

    seat: int
    why: str


@dataclass(frozen=True)
class Done:
    """A member has trained to the end, and knows that all others have."""

    seat: int


Event = Opened | Ready | Left | Went | Dead | Suspect | Resize | Rebalance | Drain | Done


# --- instructions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fork:
    seat: int


@dataclass(frozen=True)
class Kill:
    """The fence: after this, the seat can do nothing any more, thawed or not."""

    seat: int


@dataclass(frozen=True)
class Release:
    """A worker that is not needed any more ends by itself."""

    seat: int


@dataclass(frozen=True)
class Break:
    """The epoch is over in the middle of a step: members leave as soon as they look."""

    epoch: int


@dataclass(frozen=True)
class Ask:
    """Members leave after the step in flight."""

    epoch: int


@dataclass(frozen=True)
class Form:
    epoch: int
    seats: tuple[int, ...]  # by rank
    steps: tuple[int, ...]  # that each of them holds; those with less than the most take the state over
    due: bool  # what follows the newest step is still to be done

    @property
    def cold(self) -> bool:
        """Nobody holds anything: from the newest checkpoint, or from the start."""
        return max(self.steps) == FRESH

    @property
    def donor(self) -> int:
        """The rank that hands its state on."""
        return self.steps.index(max(self.steps))


@dataclass(frozen=True)
class Tell:
    """A line of the event log."""

    event: str  # joined, lost, suspected, resized, rebalanced, recovered, paused, refused
    why: str
    cost_s: float
    seats: tuple[int, ...] = ()
    more: tuple[tuple[str, int | float | str], ...] = ()


@dataclass(frozen=True)
class Finish:
    """The run has its result."""


@dataclass(frozen=True)
class GiveUp:
    why: str


Instruction = Fork | Kill | Release | Break | Ask | Form | Tell | Finish | GiveUp


class At(Enum):
    building = "building"
    idle = "idle"  # belongs to no epoch that goes on: new, or has left one
    active = "active"  # member of the epoch
    gone = "gone"  # released or killed, and not yet seen to end


MOVING = (At.building, At.active)  # seats that are expected to make progress


@dataclass
class Seat:
    number: int
    at: At = At.building
    step: int = FRESH
    due: bool = False
    drains: str = ""  # why it is to leave, "" when it is not


@dataclass
class Membership:
    """The decider. ``wanted`` workers, never fewer than ``least``, at most ``most`` (the shards of the recipe)."""

    wanted: int
    least: int
    most: int
    epoch: int = 0
    finished: bool = False
    seats: dict[int, Seat] = field(default_factory=dict)
    members: tuple[int, ...] = ()  # of the epoch, by rank, the lost ones too
    step: int = 0  # the newest that is known to be committed
    deepest: int = 1  # stages that the model can be cut into
    _next: int = 0
    _opened: bool = False
    _broken: bool = False
    _asked: bool = False
    _goes: bool = False  # the epoch has committed a step
    _paused: bool = False
    _deaths: int = 0  # of members, since the last committed step
    _stillborn: int = 0  # new workers that ended before they could join, since one has joined
    _since: float = 0.0  # when the last epoch was seen to end
    _whys: list[str] = field(default_factory=list)
    _size: int = 0  # of the last epoch that committed a step
    _moves: str = ""  # why shards are to move, "" when they are not
    _moved: str = ""  # why they have moved in this epoch
    _resized: str = ""  # why the number of workers changes, "" when nobody asked for it

    def begin(self, now: float) -> list[Instruction]:
        self._since = now
        return [self._fork()]

    def on(self, event: Event, now: float) -> list[Instruction]:
        """What is to be done, in this order. Events of seats that have ended are ignored."""
        out: list[Instruction] = []
        if self.finished:
            return self._after_the_end(event)
        match event:
            case Opened():
                self._opened = True
            case Resize(workers, why):
                if not self.least <= workers <= self.most:
                    least = f"{workers} workers cannot be: this run has from {self.least} to {self.most}"
                    return [Tell("refused", least, 0.0)]
                self.wanted, self._resized = workers, why
                self._stillborn = 0
            case _:
                seat = self.seats.get(event.seat)
                if seat is None:
                    return []
                self._on_seat(event, seat, now, out)
        if not self.finished:
            self._decide(now, out)
        return out

    def _after_the_end(self, event: Event) -> list[Instruction]:
        if isinstance(event, Dead):
            self.seats.pop(event.seat, None)
        elif isinstance(event, Ready | Left) and event.seat in self.seats:
            return [Release(event.seat)]
        return []

    def _on_seat(self, event: Event, seat: Seat, now: float, out: list[Instruction]) -> None:
        match event:
            case Ready(_, deepest):
                seat.at, self.deepest = At.idle, deepest
            case Left(_, step, due):
                if seat.at is At.active:
                    self._left(seat, step, due, now, out)
            case Went(_, epoch, step):
                self._went(epoch, step, now, out)
            case Dead(_, why):
                self._lost(seat, why, now, out)
            case Suspect(_, evidence):
                if seat.at is not At.gone:
                    was, seat.at = seat.at, At.gone
                    out += [Tell("suspected", evidence, 0.0, (seat.number,)), Kill(seat.number)]
                    if was is At.active:
                        self._miss(evidence, now, out)
            case Rebalance(_, why):
                self._moves = why
            case Drain(_, why):
                if not seat.drains:
                    seat.drains = why
                    self.wanted, self._resized = max(self.least, self.wanted - 1), why
            case Done():
                self.finished = True
                out += [Finish()]
                out += [Release(other.number) for other in self.seats.values() if other.at is At.idle]

    def _left(self, seat: Seat, step: int, due: bool, now: float, out: list[Instruction]) -> None:
        if not self._whys and all(self.seats[n].at is At.active for n in self.members if n in self.seats):
            self._since = now  # the clock of a change starts when the first member is out
        seat.at, seat.step, seat.due = At.idle, step, due
        if not self._asked:
            self._break(out)

    def _went(self, epoch: int, step: int, now: float, out: list[Instruction]) -> None:
        if epoch != self.epoch or self._goes:
            return
        self._goes = True
        self.step, self._deaths, self._paused = step, 0, False
        cost, members = now - self._since, self.members
        size = (("workers", len(members)), ("before", self._size))
        if self._whys:
            out.append(Tell("recovered", "; ".join(self._whys), cost, members, size))
        elif self._size and self._size != len(members):
            why = self._resized or "a lost worker's place is taken"
            out.append(Tell("resized", why, cost, members, size))
            self._resized = ""
        elif self._moved:
            out.append(Tell("rebalanced", self._moved, cost, members, size))
        self._size, self._whys = len(members), []

    def _lost(self, seat: Seat, why: str, now: float, out: list[Instruction]) -> None:
        del self.seats[seat.number]
        if seat.at is At.gone and not why:
            return  # it was released
        out.append(Tell("lost", why, 0.0, (seat.number,)))
        if seat.at is At.active:
            self._miss(why, now, out)
        if seat.number in self.members:
            self._deaths += 1
        else:
            self._stillborn += 1
        if self._deaths > self.most + SPARE_DEATHS:
            self._give_up(f"{self._deaths} workers were lost without a step between them, the last one: {why}", out)
        if self._barren and len(self._staying()) < self.least:
            self._give_up(f"{self._stillborn} new workers ended before they could join, the last one: {why}", out)

    def _give_up(self, why: str, out: list[Instruction]) -> None:
        if not self.finished:
            self.finished = True
            out.append(GiveUp(why))

    def _miss(self, why: str, now: float, out: list[Instruction]) -> None:
        """The epoch has lost a member."""
        if not self._whys:
            self._since = now
        self._whys.append(why)
        self._break(out)

    def _break(self, out: list[Instruction]) -> None:
        if not self._broken:
            self._broken = True
            out.append(Break(self.epoch))

    # --- the decisions ----------------------------------------------------------------------------------------

    def _decide(self, now: float, out: list[Instruction]) -> None:
        living = [s for s in self.seats.values() if s.at is not At.gone]
        active = [s for s in living if s.at is At.active]
        if not active:
            self._form(living, now, out)
        elif not self._broken and not self._asked and self._to_change(living, active):
            self._asked = True
            out.append(Ask(self.epoch))
        self._fill(out)

    def _to_change(self, living: Sequence[Seat], active: Sequence[Seat]) -> bool:
        """Whether somebody is to come or to go who can; who comes at the same time is waited for, to pause once."""
        stay = [s for s in active if not s.drains]
        new = [s for s in living if s.at is At.idle and not s.drains]
        building = any(s.at is At.building for s in living)
        grows = bool(new) and not building and len(stay) < self.wanted
        shrinks = len(stay) > self.wanted or (len(stay) < len(active) and len(stay) + len(new) >= self.least)
        return grows or shrinks or bool(self._moves)

    def _fill(self, out: list[Instruction]) -> None:
        if not self._opened and self._next:
            if not self.seats:  # the first worker ended before it had opened the data: another one is the first
                out.append(self._fork())
            return
        if not self._barren:
            out += [self._fork() for _ in range(self.wanted - len(self._staying()))]

    @property
    def _barren(self) -> bool:
        return self._stillborn > self.most + SPARE_DEATHS

    def _staying(self) -> list[Seat]:
        return [s for s in self.seats.values() if s.at is not At.gone and not s.drains]

    def _fork(self) -> Fork:
        number, self._next = self._next, self._next + 1
        self.seats[number] = Seat(number)
        return Fork(number)

    def _form(self, living: Sequence[Seat], now: float, out: list[Instruction]) -> None:
        """A new epoch, of those who hold a state and those who wait, as soon as there are enough."""
        idle = [s for s in living if s.at is At.idle]
        newest = max((s.step for s in idle), default=FRESH)
        missing = self.wanted - sum(not s.drains for s in idle)
        building = any(s.at is At.building for s in living)
        if newest == FRESH and (not self._opened or building or (missing > 0 and not self._barren)):
            return  # at the very start, or when all were lost: everybody begins together
        chosen = sorted((s for s in idle if not s.drains), key=self._place)[: self.wanted]
        if len(chosen) < self.least or all(s.step < newest for s in chosen):
            chosen += [s for s in idle if s.drains]  # they stay until others have what they hold
        chosen.sort(key=lambda s: (s.step == FRESH, self._place(s)[1:]))
        if len(chosen) < self.least:
            if not self._paused:
                self._paused = True
                why = f"{len(chosen)} workers are left and {self.least} are needed: the run waits, its state in memory"
                out.append(Tell("paused", why, now - self._since, tuple(s.number for s in chosen)))
            return
        joined = tuple(s.number for s in chosen if s.step == FRESH)
        self.epoch += 1
        self.members = tuple(s.number for s in chosen)
        self.step, self._broken, self._asked, self._goes = newest, False, False, False
        self._moved, self._moves = self._moves, ""
        due = any(s.due for s in chosen if s.step == newest)
        out.append(Form(self.epoch, self.members, tuple(s.step for s in chosen), due))
        if joined:
            self._stillborn = 0
            why = "the run begins" if self.epoch == 1 else "it takes the state from a worker that holds it"
            out.append(Tell("joined", why if newest != FRESH or self.epoch == 1 else "all were lost", 0.0, joined))
        for seat in chosen:
            seat.at = At.active
        for seat in idle:
            if seat.at is At.idle:
                seat.at = At.gone
                out.append(Release(seat.number))

    def _place(self, seat: Seat) -> tuple[int, int, int]:
        """Those who hold the newest step come first, as they were ranked before; then those who came first."""
        rank = self.members.index(seat.number) if seat.number in self.members else len(self.members)
        return -seat.step, rank, seat.number
