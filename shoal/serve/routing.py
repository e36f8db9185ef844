"""Which request goes to which model process, as decisions only: events in, instructions out, the time handed in.

Requests wait in one place until a process has room, and go to the one with the least work at hand. Each process has at
most ``window`` requests, enough that it finds the next batch in its socket when it has answered one. The waiting line
is bounded: who comes when it is full, or could not be answered in time, is refused at once with a time to come back
(a request is refused before work is spent on it: Clockwork, Gujarati et al., 2020). Of one priority, clients take
turns, whatever number of requests each has in line.

With ``within_s`` the line is bounded by time: who comes is refused when its answer would take longer, by the times of
the last batches (`Room`), and goes to the process that would answer it first. Times are those that processes tell
(`Begun`), not when they were heard of. Who was taken and is not answered in time all the same is refused then: a bound
that is promised holds for every answer.

A process that is lost hands its requests back. Those that it was not working on go first in line, as if nothing had
been. Those that it was working on may be what killed it: after ``ATTEMPTS_TOGETHER`` such deaths a request runs with no
other one beside it, so that the next death names the guilty one, and no other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from shoal.serve.batching import ForwardTime
from shoal.serve.engine import Request
from shoal.serve.line import Line
from shoal.serve.room import PROMISED, Ahead, Room

ATTEMPTS_TOGETHER = 2  # deaths that a request may have been near to before it has to run alone
RATE_MEMORY_S = 5.0  # over which answers a second are averaged
ACTIVE_S = 1.0  # since a client's last request: it has a share
UNREAD = 0.1  # the share of a new one in the mean cost of late, which one that has not been read is taken to have


class Send(msgspec.Struct, frozen=True):
    replica: int
    request: Request


class Withdraw(msgspec.Struct, frozen=True):
    """Nobody waits for the answer any more."""

    replica: int
    id: int


class Refuse(msgspec.Struct, frozen=True):
    """The answer is this error. ``retry_after_s`` 0.0: it makes no sense to come back."""

    id: int
    status: int
    why: str
    retry_after_s: float = 0.0


Instruction = Send | Withdraw | Refuse


@dataclass(frozen=True, kw_only=True)
class Limits:
    window: int  # requests that one process may have
    waiting: int  # requests in line beside those
    within_s: float = 0.0  # from arrival to answer, at most, as far as batches can be foretold; 0.0: not bounded

    def __post_init__(self) -> None:
        if self.window < 1 or self.waiting < 0:
            raise ValueError(f"window {self.window} and waiting {self.waiting} must be at least 1 and 0")


@dataclass
class Replica:
    open: dict[int, Request] = field(default_factory=dict)  # sent and not answered, in the order of sending
    working: dict[int, int] = field(default_factory=dict)  # those of its last Begun, and what they cost
    heard: float = 0.0  # when it last said something, or got something to do after it had nothing
    work: int = 0  # cost of the open ones
    begun: int = 0  # cost of the working ones that are open
    largest: int = 0  # cost of what was begun together
    since: float = 0.0  # when they were begun, or others ended while these were under way, by its own word
    time: ForwardTime = field(default_factory=ForwardTime)  # of work, of late
    alone: bool = False  # has a request that must run with no other
    leaving: bool = False  # gets no more requests
    version: int = 0  # of the weights

    def ahead(self, now: float, share: int, cost: int, full: int) -> Ahead:
        """Of a request of this cost, with the replica's ``share`` of the line; ``full``: cost of a batch that has no
        room left. What is late is taken to be late by as much again."""
        waiting, foretell = self.work - self.begun + share, self.time.foretell
        return Ahead(
            works=bool(self.working),
            left_s=abs(foretell(sum(self.working.values())) - (now - self.since)) if self.working else 0.0,
            waiting_s=foretell(waiting),
            with_it_s=foretell(waiting + cost),
            own_s=foretell(cost),
            full_s=foretell(max(self.largest, full)),
        )

    @property
    def takes_more(self) -> bool:
        return not (self.leaving or self.alone)


class Router:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.replicas: dict[int, Replica] = {}
        self._lines: dict[int, Line] = {}  # by version of the weights: one's crowd is not in the other's way
        self._requests: dict[int, Request] = {}
        self._where: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self._clients: dict[str, float] = {}  # when each came last, in that order; with ``within_s`` only
        self._work: dict[str, int] = {}  # cost of each client's open requests, likewise
        self._rooms: dict[int, Room] = {}  # by version, likewise
        self._cost = 0.0  # of a request, of late, likewise
        self._rate = 0.0  # answers a second while there was work
        self._rate_at = 0.0
        self._answered = 0

    def __len__(self) -> int:
        """Requests that are open."""
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """Requests that no process has yet."""
        return sum(map(len, self._lines.values()))

    @property
    def sent(self) -> int:
        return len(self._where)

    def arrive(self, request: Request, now: float, version: int = 0) -> list[Instruction]:
        """A request for this version of the weights: no other ever answers it."""
        line = self._line(version)
        number = None if line else self._least(version, request, now)
        if (number is None or self.limits.within_s) and self._is_full(version, request, now):
            self._came(version, request.client, now)
            wait = self.wait_s()
            return [Refuse(request.id, 429, full(wait), max(1.0, wait))]
        if number is None and not self.limits.within_s and self._rate and now + self.wait_s() > request.deadline:
            wait = self.wait_s()
            return [Refuse(request.id, 429, f"would wait {wait:.1f} s, longer than its time limit", max(1.0, wait))]
        if not self._requests:
            self._answered, self._rate_at = 0, now  # the time without work says nothing about the rate
        self._requests[request.id] = request
        self._versions[request.id] = version
        self._came(version, request.client, now)
        if self.limits.within_s:
            self._work[request.client] = self._work.get(request.client, 0) + request.cost
            self._cost += (UNREAD if self._cost else 1.0) * (request.cost - self._cost)
        if number is not None:
            return [self._sent(number, request, now)]
        line.push(request)
        return self._send_of(version, now)

    def turned_away(self, version: int, client: str, since: float, now: float) -> bool:
        """A request of this client has come, and has not been read: whether it is refused whatever it asks. If not, it
        will `arrive`."""
        unread = Request(-1, "predict", msgspec.Raw(), round(self._cost), since, math.inf, client=client)
        if not self._is_full(version, unread, now):
            return False
        self._came(version, client, now)
        return True

    def _is_full(self, version: int, request: Request, now: float) -> bool:
        replicas = [one for one in self._replicas_of(version) if one.takes_more]
        if self.limits.within_s and replicas:
            share = self._share(version)
            several = self._has_company(request.client)
            most_s = self._room(version).most_s(several, self._has_its_share(request.client))
            left_s = most_s - (now - request.arrived)
            if not any(self._ends_s(one, share, request.cost, most_s, several, now) <= left_s for one in replicas):
                return True
        return self.waiting >= self.limits.waiting and not any(map(self._has_room, replicas))

    def _ends_s(self, replica: Replica, share: int, cost: int, most_s: float, several: bool, now: float) -> float:
        """Until this process would have answered one who comes now. Before a batch has been timed, one batch of them is
        taken."""
        batch = max(1, self.limits.window // 2)
        if not replica.largest:
            return 0.0 if len(replica.open) < batch and not share else math.inf
        full = batch * round(self._cost)
        return self._room(replica.version).ends_s(replica.ahead(now, share, cost, full), most_s, several)

    def _share(self, version: int) -> int:
        """A process's, of the line's work."""
        replicas = sum(one.takes_more for one in self._replicas_of(version))
        return -(-self._line(version).work // max(1, replicas))

    def _room(self, version: int) -> Room:
        return self._rooms.setdefault(version, Room(self.limits.within_s))

    def _replicas_of(self, version: int) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.version == version]

    def _came(self, version: int, client: str, now: float) -> None:
        """Whether it was taken or not."""
        if not self.limits.within_s:
            return
        self._room(version).came()
        self._clients.pop(client, None)
        self._clients[client] = now
        while now - next(iter(self._clients.values())) > ACTIVE_S:
            del self._clients[next(iter(self._clients))]

    def _has_company(self, client: str) -> bool:
        """Whether other clients have come of late."""
        return len(self._clients) > (client in self._clients)

    def _has_its_share(self, client: str) -> bool:
        """Of what is open."""
        return self._work.get(client, 0) * len(self._clients) >= sum(self._work.values())

    def _line(self, version: int) -> Line:
        return self._lines.setdefault(version, Line())

    def forget(self, version: int) -> list[Instruction]:
        """No process of this version will come any more: whoever still waits for one is refused."""
        told: list[Instruction] = []
        for id in [id for id, wanted in self._versions.items() if wanted == version and id not in self._where]:
            self._close(id)
            told.append(Refuse(id, 503, "the weights that this request began with are gone: ask again", 1.0))
        self._lines.pop(version, None)
        self._rooms.pop(version, None)
        return told

    def wait_s(self) -> float:
        """How long one who comes now would wait for an answer, by the rate of late; 0.0 before any answer."""
        return (len(self._requests) + 1) / self._rate if self._rate else 0.0

    def heard(self, replica: int, now: float) -> None:
        """It has said something: it is not stuck."""
        self.replicas[replica].heard = now

    def begun(self, replica: int, ids: Sequence[int], at: float) -> None:
        """It works on these since then, and has done with the others."""
        told = self.replicas[replica]
        here = set(ids)
        done = [cost for id, cost in told.working.items() if id not in here]
        if done and at > told.since:
            told.time.seen(sum(done), at - told.since)
            told.largest = max(told.largest, sum(told.working.values()))
            if self.limits.within_s:
                self._room(told.version).answered(len(done))
        if done or not told.working:
            told.since = at
        told.working = {id: self._cost_of(id, told) for id in ids}
        told.begun = sum(cost for id, cost in told.working.items() if id in told.open)

    def _cost_of(self, id: int, replica: Replica) -> int:
        """Of one that it works on, and that may have been withdrawn when it had begun."""
        request = replica.open.get(id)
        return replica.working.get(id, round(self._cost)) if request is None else request.cost

    def reached(self, id: int, payload: msgspec.Raw) -> None:
        """An item of its stream has been handed to its client: a later process goes on after it."""
        request = self._requests.get(id)
        if request is not None:
            self._requests[id] = msgspec.structs.replace(request, reached=(*request.reached, payload))

    def answered(self, replica: int, ids: Sequence[int], now: float) -> list[Instruction]:
        known = [id for id in ids if self._where.get(id) == replica]
        for id in known:
            self._close(id)
        self._measure(len(known), now)
        return self._send(now)

    def cancel(self, id: int, now: float) -> list[Instruction]:
        """The client has left."""
        if id not in self._requests:
            return []
        replica = self._where.get(id)
        self._close(id)
        return [*([Withdraw(replica, id)] if replica is not None else []), *self._send(now)]

    def up(self, replica: int, now: float, version: int = 0) -> list[Instruction]:
        self.replicas[replica] = Replica(heard=now, version=version)
        return self._send(now)

    def leave(self, replica: int) -> None:
        """It is to get no more requests: it is gone once the open ones are answered."""
        self.replicas[replica].leaving = True

    def load(self, replica: int) -> int:
        """The work that it has at hand."""
        return self.replicas[replica].work

    def leaving(self) -> set[int]:
        return {number for number, replica in self.replicas.items() if replica.leaving}

    def left(self) -> list[int]:
        """Those that were to leave, and have nothing more to do."""
        return [number for number, replica in self.replicas.items() if replica.leaving and not replica.open]

    def lost(self, replica: int, now: float) -> list[Instruction]:
        """It has died. Its requests run again elsewhere."""
        gone = self.replicas.pop(replica, None)
        if gone is None:
            return []
        told: list[Instruction] = []
        for id in reversed(gone.open):
            del self._where[id]
            request = self._requests[id]
            if id in gone.working:
                request = msgspec.structs.replace(request, attempt=request.attempt + 1)
                self._requests[id] = request
            if id in gone.working and gone.alone:
                del self._requests[id], self._versions[id]
                self._uncount(request)
                why = f"a model process died each of the {request.attempt} times that it worked on this request"
                told.append(Refuse(id, 500, why))
            else:
                self._line(self._versions[id]).push(request, first=True)
        return [*told, *self._send(now)]

    def expire(self, now: float) -> list[Instruction]:
        """Ends the requests whose time is over."""
        told: list[Instruction] = []
        for id in [request.id for request in self._requests.values() if request.deadline <= now]:
            told += [self.too_late(id), *self.cancel(id, now)]
        return told

    def too_late(self, id: int) -> Refuse:
        """What who has been taken, and cannot be answered in time, is told."""
        if not self.limits.within_s:
            return Refuse(id, 504, "was not answered within its time limit")
        return Refuse(id, 429, "could not be answered within the time that this server keeps", max(1.0, self.wait_s()))

    def deadline(self, since: float, timeout_s: float) -> float:
        """Of a request that came then, and may take so long otherwise."""
        return since + min(timeout_s, PROMISED * self.limits.within_s or timeout_s)

    def next_deadline(self) -> float:
        """When the first of those that are open has to be answered; infinite: none is."""
        return min((request.deadline for request in self._requests.values()), default=math.inf)

    def stuck(self, now: float, after_s: float) -> Iterator[int]:
        """Processes that have had work and said nothing for longer than this: busy ones tell of every batch."""
        for number, replica in self.replicas.items():
            if self._has_work(replica) and now - replica.heard > after_s:
                yield number

    def _has_work(self, replica: Replica) -> bool:
        """Requests that were refused late are not open any more, but may keep a process at work."""
        return bool(replica.open or (self.limits.within_s and replica.working))

    def _has_room(self, replica: Replica) -> bool:
        return replica.takes_more and len(replica.open) < self.limits.window

    def _send(self, now: float) -> list[Instruction]:
        return [sent for version, line in list(self._lines.items()) if line for sent in self._send_of(version, now)]

    def _send_of(self, version: int, now: float) -> list[Instruction]:
        line = self._lines[version]
        sends: list[Instruction] = []
        while (request := line.peek()) is not None:
            number = self._least(version, request, now)
            if number is None:
                break
            line.pop()
            sends.append(self._sent(number, request, now))
        return sends

    def _least(self, version: int, request: Request, now: float) -> int | None:
        """The process with the least work that may have this request, or that would answer it first, where answers
        have to come within a time; None when none has room for it."""
        must_be_alone = request.attempt >= ATTEMPTS_TOGETHER
        best: tuple[float, int, int, int] | None = None
        for number, replica in self.replicas.items():
            if replica.version == version and self._has_room(replica) and not (must_be_alone and replica.open):
                first = self._answers_after_s(replica, request, now) if self.limits.within_s else 0.0
                load = first, replica.work, len(replica.open), number
                if best is None or load < best:
                    best = load
        return None if best is None else best[3]

    def _answers_after_s(self, replica: Replica, request: Request, now: float) -> float:
        several = self._has_company(request.client)
        most_s = self._room(replica.version).most_s(several, has_its_share=False)
        return self._ends_s(replica, 0, request.cost, most_s, several, now)

    def _sent(self, number: int, request: Request, now: float) -> Send:
        replica = self.replicas[number]
        if not self._has_work(replica):
            replica.heard = now
        replica.open[request.id] = request
        replica.work += request.cost
        replica.alone = request.attempt >= ATTEMPTS_TOGETHER
        self._where[request.id] = number
        return Send(number, request)

    def _close(self, id: int) -> None:
        request, version = self._requests.pop(id), self._versions.pop(id)
        if self.limits.within_s:
            self._uncount(request)
        number = self._where.pop(id, None)
        if number is None:
            self._line(version).drop(request)
        else:
            replica = self.replicas[number]
            del replica.open[id]
            replica.work -= request.cost
            replica.begun -= request.cost if id in replica.working else 0
            replica.alone = replica.alone and bool(replica.open)

    def _uncount(self, request: Request) -> None:
        left = self._work.get(request.client, 0) - request.cost
        if left > 0:
            self._work[request.client] = left
        else:
            self._work.pop(request.client, None)

    def _measure(self, answers: int, now: float) -> None:
        """A running rate: answers of the last stretch, weighed by how much of the memory it fills."""
        self._answered += answers
        passed = now - self._rate_at
        if passed < 0.1:
            return
        share = 1.0 if not self._rate or passed > RATE_MEMORY_S else passed / RATE_MEMORY_S
        self._rate += share * (self._answered / passed - self._rate)
        self._answered, self._rate_at = 0, now


def full(wait_s: float) -> str:
    """What who is refused is told."""
    return f"as many requests are open as may be: come back in about {max(1, round(wait_s))} s"
