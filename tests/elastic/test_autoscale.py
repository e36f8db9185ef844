"""How many workers a run should have: laws of the policy, from step times and free cores alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.elastic.autoscale import LONGEST_REST, REST, ROOM, SHORT, SKIPPED, Autoscale, Decision, Seen

WINDOW = 3
MANY = 99.0  # free cores
bounds = st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(0, 8)).map(
    lambda drawn: (min(drawn[:2]), max(drawn[:2]), max(drawn[:2]) + drawn[2])
)


def policy_of(least: int, most: int, shards: int) -> Autoscale:
    return Autoscale(least, most, shards, window=WINDOW, window_s=0.0)


def ideal(shards: int) -> Callable[[int], float]:
    """Seconds of a step that takes as long as its fullest worker, and nothing else."""
    return lambda workers: -(-shards // workers) * 0.1


def drive(
    policy: Autoscale, start: int, seconds: Callable[[int], float], free: Callable[[int], float], windows: int
) -> tuple[list[int], list[tuple[int, Decision]]]:
    """The size of every step, and the decisions with the step after which each came. Every wish comes true at once."""
    sizes, decisions, workers = [], [], start
    for step in range(windows * (WINDOW + SKIPPED)):
        sizes.append(workers)
        seen = Seen(workers=workers, wanted=workers, seconds=seconds(workers), free=free(workers))
        decided = policy.committed(seen)
        if decided is not None:
            decisions.append((step, decided))
            workers = decided.workers
    return sizes, decisions


def changes(decisions: Sequence[tuple[int, Decision]]) -> list[tuple[int, int, int]]:
    return [(step, d.before, d.workers) for step, d in decisions if d.before != d.workers]


@given(bounds, st.data())
def test_where_work_splits_well_and_cores_are_free_the_run_ends_at_the_fastest_size_and_stays(bound, data):
    least, most, shards = bound
    policy = policy_of(*bound)
    start = data.draw(st.integers(least, most))
    sizes, _ = drive(policy, start, ideal(shards), lambda _: MANY, windows=2 * most + 2)
    assert ideal(shards)(sizes[-1]) == ideal(shards)(most)
    last = drive(policy, sizes[-1], ideal(shards), lambda _: MANY, windows=40)
    assert (set(last[0]), last[1]) == ({sizes[-1]}, [])


@given(bounds, st.data(), st.floats(0.001, 10.0))
@settings(max_examples=30)  # of a thousand windows each
def test_where_more_workers_bring_nothing_the_run_stays_small_and_tries_ever_less_often(bound, data, seconds):
    most = bound[1]
    start = data.draw(st.sampled_from(policy_of(*bound).useful()))
    sizes, decisions = drive(policy_of(*bound), start, lambda _: seconds, lambda _: MANY, windows=1000)
    assert set(sizes) <= {start, *[n for n in policy_of(*bound).useful() if n > start][:1]}
    assert sum(n != start for n in sizes) <= 0.05 * len(sizes), "what tries cost"
    tries = [step for step, before, to in changes(decisions) if to > before]
    gaps = [b - a for a, b in pairwise(tries)]
    assert all(gap >= REST * WINDOW for gap in gaps)
    assert gaps == sorted(gaps)
    assert all(gap <= (LONGEST_REST + 4) * (WINDOW + SKIPPED) for gap in gaps), "it never stops looking"
    assert bool(tries) == (start != most and ideal(bound[2])(start) > ideal(bound[2])(most))


@given(bounds, st.data(), st.integers(0, 2**32))
def test_whatever_is_seen_sizes_stay_within_bounds_and_a_change_is_not_taken_back_and_made_again_at_once(
    bound, data, seed
):
    least, most, _ = bound
    start = data.draw(st.integers(least, most))
    drawn = Random(seed)
    sizes, decisions = drive(
        policy_of(*bound), start, lambda _: drawn.uniform(0.01, 1.0), lambda _: drawn.uniform(0.0, 4.0), windows=60
    )
    assert all(least <= n <= most for n in sizes)
    made: dict[tuple[int, int], int] = {}
    for step, before, to in changes(decisions):
        assert step - made.get((before, to), -LONGEST_REST * 9) >= REST * WINDOW, "made again within a rest"
        made[before, to] = step


@given(bounds, st.data(), st.floats(SHORT, ROOM, exclude_max=True))
def test_without_an_idle_core_no_worker_is_added(bound, data, free):
    start = data.draw(st.integers(*bound[:2]))
    _, decisions = drive(policy_of(*bound), start, ideal(bound[2]), lambda _: free, windows=20)
    assert decisions == []


@given(bounds, st.data(), st.integers(0, 2**32))
def test_every_verdict_is_what_the_two_measured_times_say(bound, data, seed):
    drawn = Random(seed)
    times = {n: drawn.uniform(0.01, 1.0) for n in range(bound[0], bound[1] + 1)}
    start, policy = data.draw(st.integers(*bound[:2])), policy_of(*bound)
    shards = bound[2]
    _, decisions = drive(policy, start, times.__getitem__, lambda _: drawn.choice((0.0, MANY)), 15)
    for (_, tried), (_, verdict) in zip(decisions[::2], decisions[1::2], strict=False):
        assert verdict.before == tried.workers
        small, large = sorted((tried.before, tried.workers))
        possible = ideal(shards)(small) / ideal(shards)(large) - 1
        brings = times[small] / times[large] - 1
        if abs(brings - policy.share * possible) > 1e-9:
            assert verdict.workers == (large if possible > 1e-9 and brings > policy.share * possible else small)


def test_sizes_that_deal_no_fewer_shards_to_the_fullest_worker_are_not_tried():
    assert policy_of(1, 8, 8).useful() == [1, 2, 3, 4, 8]


def test_on_a_full_host_fewer_workers_are_tried_once_and_kept_where_they_do_as_well():
    sizes, decisions = drive(policy_of(1, 2, 8), 2, lambda _: 0.1, lambda _: 0.0, windows=8)
    assert sizes[-1] == 1
    assert changes(decisions) == [(WINDOW + SKIPPED - 1, 2, 1)]
    sizes, decisions = drive(policy_of(1, 2, 8), 2, ideal(8), lambda _: 0.0, windows=8)
    assert sizes[-1] == 2
    assert [(before, to) for _, before, to in changes(decisions)] == [(2, 1), (1, 2)]


def test_the_reason_has_the_figures_that_it_was_decided_by():
    times = {1: 0.1, 2: 0.08}
    _, [(_, tried), (_, verdict)] = drive(policy_of(1, 2, 8), 1, times.__getitem__, lambda _: 1.5, windows=3)
    assert tried.why == "2 workers tried: 1.5 idle cores"
    assert verdict.why == (
        "100 ms a step with 1 worker, 80 ms with 2: +25% in speed, where the shards allow +100% and at least +50% is "
        "wanted; 1 it is"
    )


def test_a_number_that_somebody_asks_for_ends_a_try_and_stays_for_a_rest():
    policy = policy_of(1, 8, 8)
    drive(policy, 1, ideal(8), lambda _: MANY, windows=1)
    sizes, decisions = drive(policy, 3, ideal(8), lambda _: MANY, windows=REST - 5)
    assert (set(sizes), decisions) == ({3}, [])
    sizes, _ = drive(policy, 3, ideal(8), lambda _: MANY, windows=2 * REST)
    assert sizes[-1] == 8


def test_steps_of_another_number_of_workers_than_is_wanted_say_nothing():
    policy = policy_of(1, 4, 4)
    seen = Seen(workers=1, wanted=2, seconds=0.1, free=MANY)
    assert [policy.committed(seen) for _ in range(50)] == [None] * 50, "the place of a lost worker is still empty"
    found = [policy.committed(replace(seen, workers=2)) for _ in range(WINDOW + SKIPPED)]
    assert [d.workers for d in found if d] == [4]


def test_a_window_is_long_enough_in_seconds_too():
    policy = Autoscale(1, 2, 2, window=3, window_s=0.45)
    seen = Seen(workers=1, wanted=1, seconds=0.1, free=MANY)
    found = [policy.committed(seen) for _ in range(SKIPPED + 5)]
    assert [bool(d) for d in found] == [False] * (SKIPPED + 4) + [True]
