"""From the event log to series: what counts, what is left out, and what the sums say."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logbook import committed, evaluated, started, story

from shoal.observe.curves import PARTS, Curves, Series, read_curves


def test_every_figure_of_a_whole_run_is_that_of_the_log():
    curves = read_curves(story(10))
    assert (curves.state, curves.step, curves.steps) == ("finished", 10, 10)
    assert curves.loss.x == tuple(range(1, 11))
    assert curves.loss.y == tuple(4.0 / step for step in range(1, 11))
    assert curves.samples_per_s.y == (64.0,) * 10
    assert curves.targets_per_s.y == (640.0,) * 10
    assert curves.evaluated["validation"]["accuracy"].y == (0.25, 0.5)
    assert curves.result == {"weights_sha256": "5" * 64}
    assert [saved.best for saved in curves.saved] == [True]
    assert [sample.text for sample in curves.samples] == ["to be or not"]
    assert curves.wall_s == 12.0


def test_the_best_figure_is_the_lowest_loss_and_the_highest_accuracy():
    curves = read_curves(story(10))
    assert curves.best("validation", "loss") == (5, 1.5)
    assert curves.best("validation", "accuracy") == (10, 0.5)
    assert curves.best("test", "loss") is None


def test_a_figure_that_was_never_finite_has_no_best():
    assert read_curves([evaluated(1, loss="nan")]).best("validation", "loss") is None


def test_the_first_of_two_equal_figures_is_the_best():
    curves = read_curves([evaluated(3, loss=1.0, accuracy=0.5), evaluated(6, loss=1.0, accuracy=0.5)])
    assert curves.best("validation", "loss") == (3, 1.0)
    assert curves.best("validation", "accuracy") == (3, 0.5)


def test_work_redone_after_a_kill_counts_once_and_the_last_time():
    log = [started(), *(committed(step, loss=1.0) for step in range(1, 6))]
    log += [
        {"time": 9.0, "event": "resumed", "step": 3, "checkpoint": "c/3", "skipped": [{"path": "c/4", "why": "torn"}]}
    ]
    log += [started(10.0), *(committed(step, time=10.0 + step, loss=2.0) for step in range(4, 8))]
    curves = read_curves(log)
    assert curves.loss.x == (1, 2, 3, 4, 5, 6, 7)
    assert curves.loss.y == (1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0)
    assert [(r.step, r.redone, r.skipped) for r in curves.resumes] == [(3, 2, (("c/4", "torn"),))]


def test_steps_that_a_resumed_run_has_not_reached_again_are_left_out():
    log = [started(), *map(committed, range(1, 6)), evaluated(5, loss=1.0)]
    log += [{"time": 9.0, "event": "resumed", "step": 3}, committed(4, time=9.5)]
    curves = read_curves(log)
    assert curves.step == 4
    assert curves.loss.x == (1, 2, 3, 4)
    assert curves.evaluated == {}


@pytest.mark.parametrize("resumed_first", [True, False])
def test_the_time_between_two_sessions_does_not_count(resumed_first):
    again = [{"time": 1000.0, "event": "resumed", "step": 2}, started(1000.5)]
    log = [started(0.0), committed(1), committed(2), *(again if resumed_first else reversed(again))]
    log += [committed(3, time=1003.0)]
    curves = read_curves(log)
    assert len(curves.sessions) == 2
    assert curves.wall_s == pytest.approx(2.0 + 3.0, abs=0.6)  # the two events of a restart are half a second apart
    assert curves.active_s(500.0) == 2.0
    assert curves.facts["host"] == "here"


def test_a_run_that_failed_before_its_first_step_has_a_reason_and_no_points():
    curves = read_curves([started(), {"time": 1.0, "event": "failed", "step": 0, "why": "no memory"}])
    assert (curves.state, curves.step, len(curves.loss)) == ("failed", 0, 0)
    assert [(stop.kind, stop.why) for stop in curves.stops] == [("failed", "no memory")]
    assert curves.shares == {}


def test_a_run_that_failed_and_was_started_again_is_open():
    log = [started(), {"time": 1.0, "event": "failed", "step": 0, "why": "x"}, started(5.0), committed(1, time=6.0)]
    assert read_curves(log).state == "open"


def test_no_events_are_an_open_run_without_points():
    nothing = Curves(parts=dict.fromkeys(PARTS, Series()))
    assert read_curves([]) == nothing
    assert nothing.wall_s == 0.0


def test_not_a_number_as_text_is_a_point_that_is_not_finite():
    curves = read_curves([committed(1, loss="nan", grad_norm="inf"), committed(2, loss=1.0)])
    assert math.isnan(curves.loss.y[0])
    assert curves.grad_norm.y == (math.inf, 1.0)


def test_events_without_the_fields_that_they_need_are_passed_over():
    log = [{"event": "committed"}, {"time": 1.0}, {"time": 1.0, "event": "committed", "step": None}, committed(1)]
    log += [
        committed(2, loss=None, seconds=None, parts=None, waited=None),
        {"time": 3.0, "event": "unheard", "step": 1},
    ]
    curves = read_curves(log)
    assert curves.step == 2
    assert curves.loss.x == (1,)
    assert curves.seconds.x == (1,)


def test_what_no_part_names_is_other():
    curves = read_curves([committed(1, seconds=1.0, parts={"forward": 0.25, "backward": 0.5})])
    assert {part: series.y for part, series in curves.parts.items() if series.y != (0.0,)} == {
        "forward": (0.25,),
        "backward": (0.5,),
        "other": (0.25,),
    }


def test_waiting_is_weighted_by_the_length_of_the_steps():
    log = [committed(1, seconds=1.0, waited={"0": 0.5}), committed(2, seconds=3.0, waited={"0": 0.0, "1": 0.3})]
    curves = read_curves(log)
    assert curves.waited[0].y == (0.5, 0.0)
    assert curves.waiting == {0: 0.125, 1: pytest.approx(0.1)}


seconds = st.floats(1e-6, 1e3)


@given(st.lists(st.tuples(seconds, st.dictionaries(st.sampled_from(PARTS[:-1]), seconds)), min_size=1, max_size=20))
def test_the_shares_of_the_parts_add_up_to_one(steps):
    log = [committed(i, seconds=took, parts=parts) for i, (took, parts) in enumerate(steps, 1)]
    shares = read_curves(log).shares
    assert set(shares) == set(PARTS)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(share >= 0 for share in shares.values())


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(0, 30))
def test_steps_rise_and_none_comes_twice_in_any_order_of_the_log(steps, resumed):
    log = [committed(step) for step in steps] + [{"time": 99.0, "event": "resumed", "step": resumed}]
    x = read_curves(log).loss.x
    assert list(x) == sorted({step for step in steps if step <= resumed})
