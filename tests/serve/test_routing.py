"""The router: every request has one end, whatever dies, and no process gets more than its window."""

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.engine import Request
from shoal.serve.routing import ATTEMPTS_TOGETHER, Instruction, Limits, Refuse, Router, Send, Withdraw

RAW = msgspec.Raw(b"\xc0")


def request(id: int, client: str = "a", priority: int = 0, cost: int = 1, deadline: float = 1e9) -> Request:
    return Request(id, "predict", RAW, cost, 0.0, deadline, priority, client)


@dataclass
class World:
    """Processes that answer in order; one that works on a poisoned request dies of it."""

    router: Router
    poison: frozenset[int] = frozenset()
    batch: int = 4
    now: float = 0.0
    queues: dict[int, list[Request]] = field(default_factory=dict)
    ends: dict[int, list[str]] = field(default_factory=dict)
    next_replica: int = 0

    def carry_out(self, instructions: list[Instruction]) -> None:
        for one in instructions:
            match one:
                case Send():
                    assert all(r.id != one.request.id for queue in self.queues.values() for r in queue)
                    self.queues[one.replica].append(one.request)
                    assert len(self.queues[one.replica]) <= self.router.limits.window
                case Withdraw():
                    self.queues[one.replica] = [r for r in self.queues[one.replica] if r.id != one.id]
                case Refuse():
                    self.ends.setdefault(one.id, []).append(str(one.status))

    def start(self) -> None:
        number, self.next_replica = self.next_replica, self.next_replica + 1
        self.queues[number] = []
        self.carry_out(self.router.up(number, self.now))

    def work(self, replica: int) -> None:
        batch = self.queues[replica][: self.batch]
        if not batch:
            return
        self.now += 1.0
        self.router.heard(replica, self.now)
        self.router.begun(replica, [r.id for r in batch], self.now)
        if self.poison & {r.id for r in batch}:
            self.die(replica)
            return
        for one in batch:
            if one in self.queues[replica]:
                self.queues[replica].remove(one)
            self.ends.setdefault(one.id, []).append("done")
            self.carry_out(self.router.answered(replica, [one.id], self.now))

    def die(self, replica: int) -> None:
        del self.queues[replica]
        self.carry_out(self.router.lost(replica, self.now))

    def arrive(self, one: Request) -> None:
        self.carry_out(self.router.arrive(msgspec.structs.replace(one, arrived=self.now), self.now))

    def finish(self) -> None:
        for _ in range(1000):
            if not len(self.router):
                return
            if not self.queues:
                self.start()
            for replica in list(self.queues):
                if replica in self.queues:
                    self.work(replica)
        raise AssertionError(f"{len(self.router)} requests never end")


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 2), st.integers(0, 2)),
        st.tuples(st.just("work"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("die"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("start"), st.just(0), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 60), st.just(0)),
        st.tuples(st.just("expire"), st.integers(0, 30), st.just(0)),
    ),
    max_size=80,
)


def play(events: list[tuple[str, int, int]], router: Router, poison: frozenset[int]) -> tuple[World, int, set[int]]:
    world, arrived, cancelled = World(router, poison), 0, set()
    world.start()
    for kind, a, b in events:
        replica = sorted(world.queues)[a % len(world.queues)] if world.queues else None
        if kind == "arrive":
            world.arrive(request(arrived, client="abc"[a], priority=b, deadline=arrived + 20.0))
            arrived += 1
        elif kind == "start" and len(world.queues) < 4:
            world.start()
        elif kind == "cancel" and a < arrived and a not in world.ends:
            world.carry_out(router.cancel(a, world.now))
            cancelled.add(a)
        elif kind == "expire":
            world.now = max(world.now, float(a))
            world.carry_out(router.expire(world.now))
        elif kind == "work" and replica is not None:
            world.work(replica)
        elif kind == "die" and replica is not None:
            world.die(replica)
    world.finish()
    return world, arrived, cancelled


@given(events=EVENTS, window=st.integers(1, 6), waiting=st.integers(0, 8), poison=st.frozensets(st.integers(0, 30)))
def test_every_request_has_exactly_one_end_whatever_dies(events, window, waiting, poison):
    world, arrived, cancelled = play(events, Router(Limits(window=window, waiting=waiting)), poison)
    assert set(world.ends) | cancelled == set(range(arrived))
    assert not [id for id, ends in world.ends.items() if len(ends) + (id in cancelled) != 1]
    assert world.router.sent == world.router.waiting == len(world.router) == 0
    assert all(replica.work == 0 and not replica.alone for replica in world.router.replicas.values())


@given(st.integers(1, 40), st.integers(1, 3), st.frozensets(st.integers(0, 39), max_size=3))
def test_a_request_that_kills_processes_fails_alone(count, replicas, poison):
    world = World(Router(Limits(window=8, waiting=100)), poison)
    for _ in range(replicas):
        world.start()
    for id in range(count):
        world.arrive(request(id))
    world.finish()
    assert world.ends == {id: ["500" if id in poison else "done"] for id in range(count)}


def test_a_router_that_forgets_the_requests_of_the_dead_is_caught(monkeypatch):
    monkeypatch.setattr(Router, "lost", lambda self, replica, now: self.replicas.pop(replica) and [])
    with pytest.raises(AssertionError, match="never end"):
        play([("arrive", 0, 0), ("die", 0, 0)], Router(Limits(window=2, waiting=2)), frozenset())


def test_a_process_that_is_killed_from_outside_costs_no_request_its_life():
    """Each death near to it counts as one attempt; then it runs alone, and is not the one to blame."""
    world = World(Router(Limits(window=4, waiting=10)))
    world.start()
    world.arrive(request(0))
    for _ in range(ATTEMPTS_TOGETHER):
        (replica,) = world.queues
        world.router.begun(replica, [0], world.now)
        world.die(replica)
        world.start()
    world.arrive(request(1))
    (replica,) = world.queues
    assert [one.id for one in world.queues[replica]] == [0], "nothing beside the suspect"
    world.finish()
    assert world.ends == {0: ["done"], 1: ["done"]}


def test_requests_that_a_dead_process_had_not_begun_count_no_attempt_and_go_first():
    world = World(Router(Limits(window=3, waiting=10)))
    world.start()
    for id in range(5):
        world.arrive(request(id))
    world.router.begun(0, [0], world.now)
    world.die(0)
    world.start()
    assert [(one.id, one.attempt) for one in world.queues[1]] == [(0, 1), (1, 0), (2, 0)]


def test_what_a_stream_has_reached_travels_with_the_request_to_the_next_process():
    world = World(Router(Limits(window=3, waiting=10)))
    world.start()
    world.arrive(request(0))
    items = [msgspec.Raw(b"\x01"), msgspec.Raw(b"\x02")]
    for item in items:
        world.router.reached(0, item)
    world.die(0)
    world.start()
    assert list(world.queues[1][0].reached) == items


def test_the_least_work_gets_the_next_request():
    world = World(Router(Limits(window=10, waiting=10)))
    world.start()
    world.start()
    for id, cost in enumerate([100, 10, 10, 10]):
        world.arrive(request(id, cost=cost))
    assert [one.id for one in world.queues[0]] == [0]
    assert [one.id for one in world.queues[1]] == [1, 2, 3]


def test_clients_take_turns_and_higher_priorities_go_first():
    world = World(Router(Limits(window=1, waiting=20)), batch=1)
    world.start()
    order = [("greedy", 0)] * 5 + [("modest", 0), ("urgent", 1)]
    for id, (client, priority) in enumerate(order):
        world.arrive(request(id, client=client, priority=priority))
    world.finish()
    assert list(world.ends) == [0, 6, 1, 5, 2, 3, 4]


def test_who_comes_when_the_line_is_full_is_told_when_to_come_back():
    world = World(Router(Limits(window=1, waiting=2)))
    world.start()
    for id in range(5):
        world.arrive(request(id))
    assert world.ends == {3: ["429"], 4: ["429"]}
    (refusal,) = world.router.arrive(request(9), world.now)
    assert isinstance(refusal, Refuse)
    assert refusal.retry_after_s >= 1.0


def test_who_would_be_answered_too_late_is_refused_before_work_is_spent():
    world = World(Router(Limits(window=1, waiting=100)), batch=1)
    world.start()
    for id in range(12):
        world.arrive(request(id))
    world.work(0)
    world.work(0)  # one a second
    world.arrive(request(50, deadline=world.now + 3.0))
    world.arrive(request(51, deadline=world.now + 60.0))
    assert world.ends[50] == ["429"]
    assert 51 not in world.ends


def test_only_a_process_that_has_work_and_says_nothing_is_stuck():
    router = Router(Limits(window=4, waiting=4))
    router.up(0, 0.0)
    assert list(router.stuck(1000.0, 60.0)) == [], "idle for long is not stuck"
    router.arrive(request(0), 1000.0)
    assert list(router.stuck(1059.0, 60.0)) == []
    assert list(router.stuck(1061.0, 60.0)) == [0]
    router.heard(0, 1061.0)
    assert list(router.stuck(1062.0, 60.0)) == []


def bounded(window: int = 64, pace_s: float = 0.01, within_s: float = 0.5) -> World:
    """A process whose requests take so long each, in batches of 4; it has been timed at one."""
    world = World(Router(Limits(window=window, waiting=100, within_s=within_s)))
    world.start()
    for id in range(1000, 1004):
        world.arrive(request(id))
    do(world, [1000, 1001, 1002, 1003], 4 * pace_s)
    return world


def do(world: World, batch: list[int], took_s: float) -> None:
    """Process 0 works on these, for so long."""
    world.router.begun(0, batch, world.now)
    world.now += took_s
    world.queues[0] = [one for one in world.queues[0] if one.id not in batch]
    for id in batch:
        world.ends.setdefault(id, []).append("done")
    world.carry_out(world.router.answered(0, batch, world.now))
    world.router.begun(0, [], world.now)


@pytest.mark.parametrize(("pace_s", "room"), [(0.01, 42), (0.1, 4), (1.0, 1), (0.005, 64), (0.001, 164)])
def test_no_more_work_is_taken_than_is_done_in_the_time_that_an_answer_may_take(pace_s: float, room: int) -> None:
    world = bounded(pace_s=pace_s)
    for id in range(200):
        world.arrive(request(id))
    refused = [id for id in range(200) if world.ends.get(id) == ["429"]]
    taken = 200 - len(refused)
    assert refused == list(range(taken, 200))
    assert taken == room, "0.85 of half a second, in halves of it or whole batches of 32; or the line is full"
    assert len(world.queues[0]) == min(taken, 64), "what the window does not hold waits in line, and counts"


def test_the_door_opens_late_in_a_batch_when_much_is_asked() -> None:
    world, id = bounded(window=200, pace_s=0.01, within_s=1.0), 0
    opened = []
    for _ in range(12):
        taken = [one.id for one in world.queues[0]] or [1000 + id]
        if not world.queues[0]:
            world.arrive(request(1000 + id))
        world.router.begun(0, taken, world.now)
        begun, end = world.now, world.now + 0.01 * len(taken)
        opened.append(0.0)
        while world.now < end:
            for _ in range(20):  # of which few can be taken
                id += 1
                world.arrive(request(id))
            if len(world.queues[0]) > len(taken) and not opened[-1]:
                opened[-1] = (world.now - begun) / (end - begun)
            world.now += 0.01
        do(world, taken, 0.0)
    assert opened[0] == 0.0, "whoever comes is taken, before it is known how many come"
    assert opened[-1] == pytest.approx(1 - 1 / 6, abs=0.05), "a batch of 6/7 of the time, and a door open for 1/7"


def test_the_times_of_late_count() -> None:
    world = bounded(pace_s=0.01)
    for id in range(4):
        world.arrive(request(id))
    do(world, [0, 1, 2, 3], 0.4)
    assert world.router.replicas[0].time.foretell(4) == pytest.approx(0.75 * 0.04 + 0.25 * 0.4)


def test_batches_that_follow_each_other_through_stages_count_their_distance() -> None:
    """A group tells of all that is under way whenever a batch enters its first stage, or leaves its last one."""
    router = Router(Limits(window=64, waiting=0, within_s=1.0))
    router.up(0, 0.0)
    for id in range(12):
        router.arrive(request(id), 0.0)
    first, second, third = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]
    router.begun(0, first, 0.0)
    router.begun(0, [*first, *second], 0.1)
    router.answered(0, first, 0.2)
    router.begun(0, [*second, *third], 0.2)
    router.answered(0, second, 0.3)
    router.begun(0, third, 0.3)
    batch_s = router.replicas[0].time.foretell(4)
    assert batch_s == pytest.approx(0.75 * 0.2 + 0.25 * 0.1), "the first one's whole way, then one each 0.1 s"
    assert router.replicas[0].ahead(0.35, 0, 1, 4).left_s == pytest.approx(batch_s - 0.05), "of the third"


def test_before_a_batch_has_been_timed_no_more_than_one_of_them_is_taken() -> None:
    world = World(Router(Limits(window=8, waiting=5, within_s=0.001)))
    world.start()
    for id in range(20):
        world.arrive(request(id))
    assert world.ends == {id: ["429"] for id in range(4, 20)}


def test_times_are_those_of_the_model_process_however_late_they_are_heard() -> None:
    world = World(Router(Limits(window=64, waiting=0, within_s=0.5)))
    world.start()
    for id in range(4):
        world.arrive(request(id))
    world.now = 7.0  # when all of it is heard
    world.router.answered(0, [0, 1, 2, 3], world.now)
    world.router.begun(0, [0, 1, 2, 3], 1.0)
    world.router.begun(0, [], 1.2)
    assert world.router.replicas[0].time.foretell(4) == pytest.approx(0.2)


def test_while_a_batch_is_late_fewer_and_fewer_are_taken_and_at_last_nobody() -> None:
    taken = []
    for late_s in (0.0, 0.1, 0.2, 0.3, 5.0):
        world = bounded(pace_s=0.01)
        for id in range(4):
            world.arrive(request(id))
        world.router.begun(0, range(4), world.now)
        world.now += 0.04 + late_s
        for id in range(4, 100):
            world.arrive(request(id))
        taken.append(96 - sum(ends == ["429"] for ends in world.ends.values()))
    assert taken == sorted(taken, reverse=True)
    assert (taken[0] > 20, taken[-2:]) == (True, [0, 0])


def test_a_process_with_nothing_to_do_is_tried_again_however_slow_it_was() -> None:
    world = bounded(pace_s=100.0)
    world.arrive(request(0))
    world.arrive(request(1))
    assert world.ends[1] == ["429"]
    assert [one.id for one in world.queues[0]] == [0]


def test_who_comes_goes_to_the_process_that_answers_first_not_to_the_one_with_the_least_work() -> None:
    world = bounded(pace_s=0.01, within_s=2.0)
    world.start()
    world.router.replicas[1].time, world.router.replicas[1].largest = world.router.replicas[0].time, 4
    for number, ids in ((0, range(30)), (1, range(100, 120))):
        for id in ids:
            world.carry_out([world.router._sent(number, request(id), 0.0)])
    world.router.begun(0, range(30), world.now - 0.28)
    world.router.begun(1, range(100, 120), world.now)
    world.arrive(request(50))
    assert world.queues[0][-1].id == 50, "it is nearly done with its 30; the other one has all of its 20 before it"


def test_who_was_taken_and_is_not_answered_in_time_is_refused_then_and_told_when_to_come_back() -> None:
    router = Router(Limits(window=4, waiting=0, within_s=0.2))
    router.up(0, 0.0)
    late = msgspec.structs.replace(request(0), deadline=router.deadline(0.0, 30.0))
    router.arrive(late, 0.0)
    router.begun(0, [0], 0.0)
    assert router.next_deadline() == pytest.approx(0.19)
    assert router.expire(0.18) == []
    refused, withdrawn = router.expire(0.19)
    assert isinstance(refused, Refuse)
    assert (refused.status, refused.retry_after_s >= 1.0, withdrawn) == (429, True, Withdraw(0, 0))
    assert list(router.stuck(61.0, 60.0)) == [0], "what it was refused from goes on, or hangs"
    router.heard(0, 70.0)
    router.answered(0, [0], 70.0)
    router.begun(0, [], 70.0)
    assert router.replicas[0].time.foretell(1) == pytest.approx(70.0), "and its time counts"
    assert list(router.stuck(999.0, 60.0)) == []


def shares(reserved: float, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How many requests of a client that asks for one at a time are done, beside one that asks without end."""
    monkeypatch.setattr("shoal.serve.room.RESERVED", reserved)
    world, next_id = bounded(), 0
    for _ in range(50):
        for client in ["greedy"] * 100 + ["modest"]:
            world.arrive(request(next_id, client=client))
            next_id += 1
        do(world, [one.id for one in world.queues[0]][:10], 0.1)
    modest = [id for id in range(100, next_id, 101) if world.ends.get(id) != ["429"]]
    return len(modest), sum(ends == ["done"] for ends in world.ends.values())


def test_a_client_that_asks_without_end_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    modest, done = shares(0.125, monkeypatch)
    assert modest >= 49, "none was refused but the first one, which nobody knew of"
    assert done == 500, "and the process had a full batch at any time"
    assert shares(0.0, monkeypatch)[0] < 25, "without that room it is refused most of the time"
