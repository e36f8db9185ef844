"""Arrivals, percentiles and the search, as values."""

import json
import statistics
from itertools import chain, pairwise
from pathlib import Path

import pytest

from shoal.errors import UserError
from shoal.serve.load.arrivals import Arrival, dealt, poisson, read_trace
from shoal.serve.load.client import Sample
from shoal.serve.load.figures import Seen, figures, percentile
from shoal.serve.load.search import Search, kept


def test_gaps_of_an_open_loop_are_those_of_independent_users() -> None:
    arrivals = poisson(500.0, 40.0, bodies=3, seed=7)
    gaps = [b.at - a.at for a, b in pairwise(arrivals)]
    assert statistics.mean(gaps) == pytest.approx(1 / 500, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 500, rel=0.05), "exponential: as wide as its mean"
    assert sum(gap > 2 / 500 for gap in gaps) / len(gaps) == pytest.approx(0.1353, abs=0.01), "exp(-2)"
    assert [one.body for one in arrivals[:4]] == [0, 1, 2, 0]
    assert arrivals == poisson(500.0, 40.0, bodies=3, seed=7)
    assert sorted(chain(*dealt(arrivals, 3)), key=lambda one: one.at) == arrivals


def test_a_trace_is_read_in_order_of_time_and_equal_bodies_are_one(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    entries = [{"at": 2.0, "body": {"text": "b"}}, {"at": 1.0, "body": {"text": "a"}}, {"at": 4, "body": {"text": "b"}}]
    trace.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    arrivals, bodies = read_trace(trace, speed=2.0)
    assert arrivals == [Arrival(0.5, 1), Arrival(1.0, 0), Arrival(2.0, 0)]
    assert [json.loads(body)["text"] for body in bodies] == ["b", "a"]


@pytest.mark.parametrize("line", ["{", '{"at": 1}', '{"at": -1, "body": {}}', '{"at": "x", "body": {}}', "3", ""])
def test_a_trace_that_is_none_names_the_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "trace").write_text(f'{{"at": 0, "body": {{}}}}\n{line}\n' if line else "")
    with pytest.raises(UserError, match=r"line 2 of|is empty"):
        read_trace(tmp_path / "trace", 1.0)


def test_a_percentile_is_a_value_that_was_seen() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0, 50, 99, 99.9, 100)] == [1, 50, 99, 100, 100]
    assert percentile([5.0], 50) == 5.0


def samples(*each: tuple[float, float, float, int]) -> Seen:
    return Seen([Sample(due, sent, 0.0, end, status, status == 429) for due, sent, end, status in each], [], 0.5)


def test_what_was_sent_late_is_timed_from_when_it_was_due() -> None:
    seen = samples((1.0, 1.0, 1.5, 200), (1.1, 1.5, 1.6, 200), (1.2, 1.6, 1.7, 429), (1.3, 1.7, 9.0, 0))
    told = figures(seen, 0.0, 10.0, open_loop=True)
    assert told["ms"] == {"p50": 500.0, "p90": 500.0, "p99": 500.0, "p99.9": 500.0, "max": 500.0}
    assert told["all_ms"]["max"] == pytest.approx(7700.0), "no answer at all is no short one"
    assert (told["ok"], told["refused"], told["refused_with_time"], told["failed"]) == (2, 1, 1, 1)
    assert told["late_ms"]["max"] == pytest.approx(400.0)
    assert told["client_is_short"]


def test_warming_up_is_not_counted() -> None:
    seen = samples((0.1, 0.1, 5.0, 200), (2.0, 2.0, 2.1, 200))
    assert figures(seen, 1.0, 2.0, open_loop=True)["ms"]["max"] == pytest.approx(100.0)


@pytest.mark.parametrize("limit", [0.7, 37.0, 812.0, 20000.0])
def test_the_search_ends_next_to_the_limit_from_either_side(limit: float) -> None:
    for first in (1.0, 100.0, 5000.0):
        search = Search(first)
        while not search.done:
            search.tell(search.rate <= limit)
        if 0.2 < limit / first < 100:
            assert search.holds <= limit <= search.breaks
            assert search.breaks <= 1.1 * search.holds


def test_one_miss_by_chance_is_tried_again_and_does_not_count() -> None:
    search, misses = Search(100.0), 0
    while not search.done:
        by_chance = search.rate == 100.0 and not misses
        misses += by_chance
        search.tell(search.rate <= 400 and not by_chance)
    assert misses == 1
    assert search.holds > 350


def test_a_target_is_missed_by_a_refusal_or_a_failure_too() -> None:
    answered = figures(samples((1.0, 1.0, 1.1, 200)), 0.0, 2.0, open_loop=True)
    refused = figures(samples((1.0, 1.0, 1.1, 200), (1.0, 1.0, 1.1, 429)), 0.0, 2.0, open_loop=True)
    assert [kept(answered, "p99", 150), kept(answered, "p99", 50), kept(refused, "p99", 150)] == [True, False, False]
