"""A server and its clients on a clock of their own: an HTTP process that does one thing after the other, model
processes that take what has come in batches, and clients that ask again as soon as they are answered. The decisions are
the server's own (`Router`, `Batcher`); times of passes, of tokenising and of refusing are chosen."""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from shoal.serve.batching import Batcher, Waiting
from shoal.serve.engine import Begun, Failed, FromEngine, Request, Result
from shoal.serve.routing import Instruction, Limits, Refuse, Router, Send, Withdraw

RAW = msgspec.Raw(b"\xc0")
TOKENS, BATCH = 32, 32
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Answer:
    client: int
    asked: float
    came: float
    ok: bool

    @property
    def latency(self) -> float:
        return self.came - self.asked


@dataclass
class ModelProcess:
    """Reads what lies in its socket whenever it is free."""

    flood: "Flood"
    number: int
    batcher: Batcher = field(default_factory=lambda: Batcher(BATCH))
    socket: list[Instruction] = field(default_factory=list)
    busy: bool = False

    def come(self, one: Instruction) -> None:
        self.socket.append(one)
        self.work()

    def work(self) -> None:
        if self.busy:
            return
        flood = self.flood
        for one in self.socket:
            if isinstance(one, Withdraw):
                self.batcher.drop(one.id)
            elif isinstance(one, Send):
                r = one.request
                self.batcher.add(Waiting(r.id, 1, TOKENS, 0, r.arrived, r.priority, r.deadline))
        self.socket.clear()
        begun = flood.now
        batch = self.batcher.take(begun)
        if batch is None:
            return
        if batch.late:
            self.tell([Failed(id, 504, "late") for id in batch.late])
        if not batch.ids:
            self.work()
            return
        self.busy = True
        took = flood.pass_s(batch.rows)
        flood.rows.append(batch.rows)
        self.tell([Begun(batch.ids, begun)])

        def end() -> None:
            self.batcher.time.seen(batch.rows * TOKENS, took)
            self.tell([*(Result(id, RAW) for id in batch.ids), Begun((), flood.now)])
            self.busy = False
            self.work()

        flood.at(begun + took, end)

    def tell(self, messages: list[FromEngine]) -> None:
        self.flood.hand_in(lambda: self.flood.hear(self.number, messages))


@dataclass
class Flood:
    clients: int
    within_s: float
    pass_s: Callable[[int], float]  # seconds of a pass of so many rows
    processes: int = 1
    seconds: float = 3.0
    warm_s: float = 1.0  # not counted
    tokenise_s: float = 1e-4  # of the HTTP process: for a request that it takes
    refuse_s: float = 3e-5
    answer_s: float = 5e-5
    again_s: float = 0.05  # until a refused client asks again
    now: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of each pass

    def __post_init__(self) -> None:
        self.router = Router(Limits(window=2 * BATCH, waiting=256, within_s=self.within_s))
        self.models = [ModelProcess(self, number) for number in range(self.processes)]
        for number in range(self.processes):
            self.router.up(number, 0.0)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._inbox: deque[Callable[[], float]] = deque()
        self._at_work = False
        self._askers: dict[int, tuple[int, float]] = {}
        self._next = 0
        self._timer = False

    def at(self, when: float, act: Callable[[], None]) -> None:
        self._next += 1
        heapq.heappush(self._events, (when, self._next, act))

    def run(self) -> "Flood":
        for client in range(self.clients):
            self.at(client * 1e-5, lambda client=client: self.ask(client))  # type: ignore[misc]
        while self._events and self._events[0][0] < self.seconds:
            self.now, _, act = heapq.heappop(self._events)
            act()
        return self

    # the HTTP process: one thing after the other, each takes as long as it returns

    def hand_in(self, act: Callable[[], float]) -> None:
        self._inbox.append(act)
        if not self._at_work:
            self._at_work = True
            self._work()

    def _work(self) -> None:
        if self._inbox:
            self.at(self.now + self._inbox.popleft()(), self._work)
        else:
            self._at_work = False

    def ask(self, client: int) -> None:
        asked = self.now
        self.hand_in(lambda: self._asked(client, asked))

    def _asked(self, client: int, asked: float) -> float:
        if self.router.turned_away(0, "", self.now, self.now):
            self._told(client, asked, self.refuse_s, ok=False)
            return self.refuse_s
        self._next += 1
        since, id = self.now, self._next
        self._askers[id] = client, asked
        request = Request(id, "predict", RAW, TOKENS, since, self.router.deadline(since, TIMEOUT_S))
        self._carry_out(self.router.arrive(request, self.now + self.tokenise_s), self.tokenise_s)
        self._look_later()
        return self.tokenise_s

    def _look_later(self) -> None:
        if not self._timer and len(self.router):
            self._timer = True
            self.at(max(self.now, self.router.next_deadline()), lambda: self.hand_in(self._look))

    def _look(self) -> float:
        self._timer = False
        self._carry_out(self.router.expire(self.now), self.refuse_s)
        self._look_later()
        return self.refuse_s

    def hear(self, number: int, messages: list[FromEngine]) -> float:
        spent = 0.0
        answered = [one.id for one in messages if isinstance(one, Result | Failed)]
        self._carry_out(self.router.answered(number, answered, self.now), 0.0)
        for message in messages:
            if isinstance(message, Begun):
                self.router.begun(number, message.ids, message.at)
            elif isinstance(message, Result | Failed) and message.id in self._askers:
                spent += self.answer_s
                self._told(*self._askers.pop(message.id), spent, ok=isinstance(message, Result))
        return spent

    def _carry_out(self, instructions: list[Instruction], spent: float) -> None:
        for one in instructions:
            if isinstance(one, Refuse):
                self._told(*self._askers.pop(one.id), spent, ok=False)
            else:
                model = self.models[one.replica]
                self.at(self.now + spent, lambda model=model, one=one: model.come(one))  # type: ignore[misc]

    # what clients see

    def _told(self, client: int, asked: float, spent: float, ok: bool) -> None:
        came = self.now + spent
        if came >= self.warm_s:
            self.answers.append(Answer(client, asked, came, ok))
        self.at(came + (1e-3 if ok else self.again_s), lambda: self.ask(client))

    @property
    def goodput(self) -> float:
        """Answers a second after the warm part."""
        return sum(one.ok for one in self.answers) / (self.seconds - self.warm_s)

    @property
    def refused(self) -> int:
        return sum(not one.ok for one in self.answers)

    def p99(self, only_ok: bool = False) -> float:
        """Seconds, of all answers, or of those that are not refusals."""
        ordered = sorted(one.latency for one in self.answers if one.ok or not only_ok)
        return ordered[int(0.99 * len(ordered))]
