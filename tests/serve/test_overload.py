"""Eight times as many clients as a server can do with, on a clock of our own: every answer comes in time, and as many
of them as without a bound, where batches that fit the time cost no more than full ones."""

import random
from collections.abc import Callable

import pytest
from serve.flood import BATCH, Flood

from shoal.serve.batching import Batcher, Waiting
from shoal.serve.room import MARGIN, MOST_LOAD

WITHIN_S = 0.15
FLOAT32, BFLOAT16 = (0.0065, 0.0052), (0.0045, 0.00122)  # seconds of a pass: of itself, and for each row
SLOW = (0.017, 0.0151)  # a full batch takes three times the bound
HTTP_S = 0.005  # until the HTTP process has come to say so


def takes(model: tuple[float, float], rows: int) -> float:
    return model[0] + model[1] * rows


def passes(model: tuple[float, float], jitter: float = 0.0, late: float = 0.0) -> Callable[[int], float]:
    """``jitter``: a share by which times differ; ``late``: the share of batches that take twice their time."""
    rng = random.Random(0)
    return lambda rows: takes(model, rows) * (1 + rng.uniform(-jitter, jitter)) * (2 if rng.random() < late else 1)


def peak(model: tuple[float, float], rows: int = BATCH) -> float:
    return rows / takes(model, rows)


@pytest.mark.parametrize(("model", "processes"), [(FLOAT32, 1), (BFLOAT16, 1), (FLOAT32, 2)])
def test_eight_times_too_many_clients_cost_no_answers_and_wait_no_longer_than_is_said(model, processes):
    flood = Flood(512, WITHIN_S, passes(model), processes).run()
    assert flood.goodput >= 0.95 * processes * peak(model)
    assert max(one.latency for one in flood.answers) <= WITHIN_S
    assert flood.refused > 1000


@pytest.mark.parametrize(("model", "processes"), [(FLOAT32, 2), (BFLOAT16, 1), (SLOW, 1)])
def test_batches_that_differ_and_are_late_break_no_promise(model, processes):
    flood = Flood(512, WITHIN_S, passes(model, jitter=0.1, late=0.03), processes).run()
    assert max(one.latency for one in flood.answers) <= WITHIN_S + HTTP_S
    assert flood.p99() <= WITHIN_S
    given_up = [one for one in flood.answers if not one.ok and one.latency > MARGIN * WITHIN_S]
    assert len(given_up) < 0.1 * sum(one.ok for one in flood.answers), "few are taken in vain"


def test_a_model_whose_full_batch_outlasts_the_bound_gives_what_the_batches_that_fit_can_give():
    fits = max(rows for rows in range(1, BATCH) if takes(SLOW, rows) <= MARGIN * WITHIN_S * MOST_LOAD / (1 + MOST_LOAD))
    flood = Flood(512, WITHIN_S, passes(SLOW)).run()
    assert peak(SLOW, fits) < 0.9 * peak(SLOW), "less than the peak: a batch of the bound's length is a small one"
    assert flood.goodput >= 0.9 * peak(SLOW, fits)
    assert max(one.latency for one in flood.answers) <= WITHIN_S


def test_one_client_is_never_refused_and_waits_for_nobody():
    flood = Flood(1, WITHIN_S, passes(BFLOAT16, jitter=0.1)).run()
    assert flood.refused == 0
    assert flood.p99() <= 1.1 * takes(BFLOAT16, 1) + 1e-3


def test_a_spell_in_which_all_takes_ten_times_as_long_is_over_when_it_is_over():
    def pass_s(rows: int) -> float:
        return takes(BFLOAT16, rows) * (10 if 0.5 <= flood.now < 1.5 else 1)

    flood = Flood(512, WITHIN_S, pass_s, warm_s=2.5)
    flood.run()
    assert flood.goodput >= 0.95 * peak(BFLOAT16)
    assert max(one.latency for one in flood.answers) <= WITHIN_S


def test_without_a_bound_who_is_answered_has_waited_for_the_whole_line():
    assert Flood(512, 0.0, passes(BFLOAT16)).run().p99(only_ok=True) > 0.4


def test_who_takes_all_comers_until_the_time_is_full_has_small_batches(monkeypatch: pytest.MonkeyPatch):
    """The planted fault: a door that is always open."""
    model = 0.02, FLOAT32[1]
    late = Flood(512, WITHIN_S, passes(model)).run()
    monkeypatch.setattr("shoal.serve.room.MOST_LOAD", 1.0)
    assert Flood(512, WITHIN_S, passes(model)).run().goodput < 0.95 * late.goodput


def in_vain(model: tuple[float, float]) -> int:
    """Rows that were computed when nobody waited for them any more."""
    flood = Flood(512, WITHIN_S, passes(model, jitter=0.1, late=0.1), warm_s=0.0).run()
    return sum(flood.rows[:-1]) - sum(one.ok for one in flood.answers)


def test_who_works_for_those_that_will_be_late_works_in_vain(monkeypatch: pytest.MonkeyPatch):
    """The planted fault: batches take everybody along."""
    bound, add = in_vain(FLOAT32), Batcher.add

    def add_without_deadline(self: Batcher, one: Waiting) -> None:
        add(self, Waiting(one.id, one.rows, one.length, one.group, one.arrived))

    monkeypatch.setattr(Batcher, "add", add_without_deadline)
    assert in_vain(FLOAT32) > 2 * bound
