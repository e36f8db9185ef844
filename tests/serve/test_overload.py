"""Eight times as many clients as a server can do with, on a clock of our own: what is answered comes in time, and as
much of it as without a bound, where batches that fit the time cost no more than full ones."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest

from shoal.serve.batching import Batcher, Waiting
from shoal.serve.engine import Request
from shoal.serve.routing import Limits, Refuse, Router, Send

RAW = msgspec.Raw(b"\xc0")
TOKENS, BATCH = 32, 32
REFUSED_S = 0.03  # until a refused client asks again
LAG_S = 0.002  # between the HTTP process and a model process, and back
SECONDS = 5.0
WARM_S = 2.0


@dataclass
class Served:
    """Clients that ask again as soon as they are answered, one model process and the router between them."""

    clients: int
    within_s: float
    pass_s: Callable[[int], float]  # of so many rows
    now: float = 0.0
    latencies: list[float] = field(default_factory=list)  # of answers after WARM_S
    refused: int = 0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _next: int = 0
    _batcher: Batcher = field(default_factory=lambda: Batcher(BATCH))
    _busy: bool = False

    def __post_init__(self) -> None:
        self._router = Router(Limits(window=2 * BATCH, waiting=256, within_s=self.within_s))
        self._router.up(0, 0.0)

    def at(self, when: float, act: Callable[[], None]) -> None:
        self._next += 1
        heapq.heappush(self._events, (when, self._next, act))

    def run(self) -> "Served":
        for number in range(self.clients):
            self.at(number * 1e-5, self._ask)
        while self._events and self._events[0][0] < SECONDS:
            self.now, _, act = heapq.heappop(self._events)
            act()
        return self

    def _ask(self) -> None:
        self._next += 1
        request = Request(self._next, "predict", RAW, TOKENS, self.now, self.now + 30.0)
        for one in self._router.arrive(request, self.now):
            if isinstance(one, Refuse):
                self.refused += 1
                self.at(self.now + REFUSED_S, self._ask)
            else:
                self._send(one)

    def _send(self, one: object) -> None:
        assert isinstance(one, Send)
        request = one.request

        def come() -> None:
            self._batcher.add(Waiting(request.id, 1, TOKENS, 0, request.arrived))
            self._work()

        self.at(self.now + LAG_S, come)

    def _work(self) -> None:
        batch = None if self._busy else self._batcher.take(self.now)
        if batch is None:
            return
        self._busy = True
        ids, ends = list(batch.ids), self.now + self.pass_s(batch.rows)
        self.at(self.now + LAG_S, lambda: self._router.begun(0, ids, self.now))

        def free() -> None:
            self._busy = False
            self._work()

        self.at(ends, free)
        self.at(ends + LAG_S - 1e-6, lambda: self._answered(ids))  # before it hears of the next batch

    def _answered(self, ids: list[int]) -> None:
        for id in ids:
            if self.now > WARM_S:
                self.latencies.append(self.now - self._router._requests[id].arrived)
            self.at(self.now + 1e-3, self._ask)
        for one in self._router.answered(0, ids, self.now):
            self._send(one)


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def goodput(served: Served) -> float:
    return len(served.latencies) / (SECONDS - WARM_S)


ENCODER_FLOAT32 = (0.0065, 0.0052)  # seconds of a pass: of itself, and for each row
ENCODER_BFLOAT16 = (0.0045, 0.00122)


@pytest.mark.parametrize("model", [ENCODER_FLOAT32, ENCODER_BFLOAT16])
def test_eight_times_too_many_clients_cost_no_answers_and_wait_no_longer_than_is_said(model: tuple[float, float]):
    def pass_s(rows: int) -> float:
        return model[0] + model[1] * rows

    peak = goodput(Served(64, 0.0, pass_s).run())
    assert peak == pytest.approx(BATCH / pass_s(BATCH), rel=0.03)
    served = Served(512, 0.15, pass_s).run()
    assert goodput(served) >= 0.95 * peak
    assert p99(served.latencies) <= 0.15
    assert served.refused > 1000


def test_without_a_bound_who_is_answered_has_waited_for_the_whole_line():
    served = Served(512, 0.0, lambda rows: 0.0045 + 0.00122 * rows).run()
    assert p99(served.latencies) > 0.4


def test_who_takes_all_comers_until_the_time_is_full_has_small_batches(monkeypatch: pytest.MonkeyPatch):
    """The planted fault: a door that is always open."""

    def pass_s(rows: int) -> float:
        return 0.01 + ENCODER_FLOAT32[1] * rows

    late = Served(512, 0.15, pass_s).run()
    monkeypatch.setattr("shoal.serve.room.MOST_LOAD", 1.0)
    assert goodput(Served(512, 0.15, pass_s).run()) < 0.95 * goodput(late)


def test_a_model_that_becomes_slower_is_asked_for_less():
    slow = False

    def pass_s(rows: int) -> float:
        return (2 if slow else 1) * (0.0045 + 0.00122 * rows)

    served = Served(512, 0.15, pass_s)

    def slower() -> None:
        nonlocal slow
        slow = True
        served.latencies.clear()

    served.at(WARM_S, slower)
    served.run()
    assert max(served.latencies) > 0.15, "what was taken before it was known"
    assert max(served.latencies[-80:]) <= 0.15
