"""What transports count: each second once, by kind, hidden or exposed, by the peer waited for."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.accounting.account import Account, Times, sampled, stand, sweep
from shoal.comm.accounting.clocks import WINDOW, Offset
from shoal.comm.accounting.counters import Counters, Kind, Tally, Total, since, total
from shoal.comm.status import Phase, Reporter

small = st.floats(0.0, 1.0)


def exact(*values):
    return pytest.approx(values, abs=1e-9)


# --- counters ------------------------------------------------------------------------------------------------------


def test_a_tally_adds_up_calls_bytes_and_seconds_by_kind():
    counters = Counters(0, ["rank 0", "rank 1", "server 0"])
    tally = counters.tally("push", "tcp")
    assert counters.tally("push", "tcp") is tally
    tally.call(sent=10, received=3)
    tally.call(sent=5)
    tally.spend(Kind.queued, 0.25, exposed=False)
    tally.spend(Kind.transferring, 0.5, exposed=True)
    tally.wait(2, 1.0)
    now = counters.totals()["push", "tcp"]
    assert (now.calls, now.sent_bytes, now.received_bytes) == (2, 15, 3)
    assert (now.hidden_s, now.exposed_s, now.spent(Kind.waiting)) == (0.25, 1.5, 1.0)
    assert now.waits == (0.0, 0.0, 1.0)


def test_threads_have_tallies_of_their_own_that_add_up_to_one():
    counters = Counters.of_workers(0, range(2))
    together = threading.Barrier(4)
    found = []

    def push() -> None:
        together.wait()  # all four are there at once: none has another's number
        found.append(counters.tally("push", "tcp"))
        found[-1].call(sent=7)
        together.wait()

    threads = [threading.Thread(target=push) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(tally) for tally in found}) == 4
    assert (counters.totals()["push", "tcp"].calls, counters.totals()["push", "tcp"].sent_bytes) == (4, 28)


def test_what_came_between_two_moments_leaves_out_what_did_not_move():
    counters = Counters.of_workers(0, range(2))
    counters.tally("gather", "tcp").call(sent=1)
    before = counters.totals()
    counters.tally("push", "tcp").call(sent=2)
    assert since(before, counters.totals()) == {("push", "tcp"): Total(calls=1, sent_bytes=2, waits=(0.0, 0.0))}


@given(st.lists(st.tuples(small, small, st.lists(small, max_size=3)), max_size=5))
def test_totals_add_and_subtract_like_numbers(rows):
    totals = [Total(a, b, 0.0, (a, 0, b, 0), (0, b, 0, a), tuple(waits)) for a, b, waits in rows]
    whole = total(totals)
    assert whole.hidden_s + whole.exposed_s == pytest.approx(sum(2 * (a + b) for a, b, _ in rows))
    for one in totals:
        whole = whole - one
    assert (whole.calls, whole.exposed_s, sum(whole.waits)) == exact(0, 0, 0)


# --- from moments to seconds ----------------------------------------------------------------------------------------


def times_of(rows):
    times = Times(len(rows))
    for bucket, (posted, ready, late, arrived, begun, reduced) in enumerate(rows):
        times.posted[bucket], times.ready[bucket], times.late[bucket] = posted, ready, late
        times.arrived[bucket], times.begun[bucket], times.reduced[bucket] = arrived, begun, reduced
    return times


@st.composite
def passages(draw):
    """Buckets that are posted in order, and reduced one after the other."""
    rows, posted, free = [], draw(small), 0.0
    for _ in range(draw(st.integers(1, 6))):
        posted += draw(small)
        ready = posted + draw(small)
        arrived = ready + draw(small)
        begun = max(arrived, free) + draw(small)
        free = begun + draw(small)
        rows.append((posted, ready, draw(st.integers(0, 2)), arrived, begun, free))
    return rows


@given(passages(), st.floats(0.0, 12.0))
def test_every_moment_between_first_and_last_bucket_counts_once(rows, finish):
    tally = Tally(3)
    end = sweep(times_of(rows), finish, tally)
    covered = 0.0
    cursor = 0.0
    for posted, *_, reduced in rows:  # the union of all buckets' intervals
        covered += max(0.0, reduced - max(posted, cursor))
        cursor = max(cursor, reduced)
    assert end == rows[-1][-1]
    assert sum(tally.hidden) + sum(tally.exposed) == pytest.approx(covered)
    assert sum(tally.exposed) <= max(0.0, end - finish) + 1e-9
    assert sum(tally.waits) == pytest.approx(tally.exposed[Kind.waiting])
    assert min(tally.hidden + tally.exposed) >= 0.0
    assert tally.exposed[Kind.queued] == 0.0


@given(passages())
def test_before_the_end_of_computing_all_is_hidden_and_after_it_all_is_exposed(rows):
    hidden, exposed = Tally(3), Tally(3)
    sweep(times_of(rows), 1e9, hidden)
    sweep(times_of(rows), -1.0, exposed)
    assert sum(hidden.exposed) == 0.0
    assert sum(exposed.hidden) == 0.0
    assert sum(hidden.hidden) == pytest.approx(sum(exposed.exposed))


def test_a_wait_is_charged_to_the_worker_that_came_last():
    tally = Tally(3)
    sweep(times_of([(1.0, 4.0, 2, 4.5, 5.0, 6.0), (2.0, 4.0, 1, 4.5, 6.0, 6.5)]), 2.0, tally)
    assert tally.hidden[Kind.waiting] == 1.0
    assert tally.waits == [0.0, 0.0, 2.0]
    assert tally.exposed[Kind.transferring] == 1.0  # half a second on the way, half until the news was here
    assert tally.exposed[Kind.reducing] == 1.5


@given(small, st.floats(-1.0, 2.0), small)
def test_standing_still_is_skew_until_the_last_has_come_and_transfer_after_that(asked, last, more):
    tally = Tally(2)
    done = max(asked, last) + more
    stand(tally, asked, last, 1, done)
    assert sum(tally.exposed) == pytest.approx(done - asked)
    assert tally.waits[1] == pytest.approx(max(0.0, last - asked))


def test_sampled_steps_grow_apart():
    assert [step for step in range(1300) if sampled(step)] == [2, 5, 10, 20, 50, 100, 200, 500, 1000]


# --- rows -----------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def account_of(clock, buckets=2):
    counters = Counters(1, ["rank 0", "rank 1"], clock)
    report = Reporter(1, 1, None, clock)
    return Account(counters, report, [("reduce-scatter", "tcp"), ("barrier", "tcp")], [64] * buckets), report


def one_step(account, report, clock, number, passes=1):
    report(Phase.loading, step=number)
    row = account.begin()
    for _ in range(passes):
        report(Phase.forward)
        report(Phase.backward)
    for bucket in range(account.form.buckets):
        account.posted(bucket)
        clock.now += 0.5
    account.finishes()
    for bucket in range(account.form.buckets):
        account.peer_posted(bucket, 0, clock.now)
        clock.now += 0.25
        account.reduces(bucket, in_place=True)
        clock.now += 0.125
        account.reduced(bucket)
    account.settle()
    return row


def padded(row, form):
    whole = np.zeros(form.width)
    whole[: len(row)] = row
    return whole


def test_a_row_tells_what_was_counted_up_to_the_step_before():
    clock = Clock()
    account, report = account_of(clock)
    rows = [padded(one_step(account, report, clock, number), account.form) for number in range(1, 5)]
    told = [account.form.read(row) for row in rows]
    assert [one.step for one in told] == [0, 1, 2, 3]
    assert [one.steps for one in told] == [0, 1, 2, 3]
    place = ("reduce-scatter", "tcp")
    assert told[0].totals[place].exposed_s == 0.0
    gains = [b.totals[place] - a.totals[place] for a, b in itertools.pairwise(told)]
    assert all(gain.exposed_s == pytest.approx(0.75) for gain in gains)
    assert told[3].totals[place].hidden[Kind.waiting] == pytest.approx(3 * 1.0)
    assert [one.sample is not None for one in told] == [False, False, True, True]  # step 2, and the session's third
    sample = told[2].sample
    assert sample.finish - sample.begun == 1.0
    assert [name for name, _ in sample.phases] == [Phase.loading, Phase.forward, Phase.backward]
    assert len(sample.buckets) == 2


def test_of_many_phases_the_longest_travel():
    clock = Clock()
    account, report = account_of(clock)
    one_step(account, report, clock, 1)
    one_step(account, report, clock, 2, passes=100)
    row = padded(one_step(account, report, clock, 3), account.form)
    sample = account.form.read(row).sample
    assert len(sample.phases) <= 64
    since = [at for _, at in sample.phases]
    assert since == sorted(since)


# --- clocks ---------------------------------------------------------------------------------------------------------


@given(
    st.floats(-1e3, 1e3),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 0.5), st.booleans()), min_size=2, max_size=100),
)
def test_the_true_offset_is_always_within_the_bounds(true, messages):
    offset = Offset()
    for sent, delay, ours in messages:
        if ours:
            offset.delivered(sent, sent + delay - true)
        else:
            offset.received(sent - true, sent + delay)
    least, most = offset.bounds
    assert least - 1e-6 <= true <= most + 1e-6
    if offset.seconds is not None:
        assert abs(offset.seconds - true) <= offset.error_s + 1e-6


def test_an_offset_needs_messages_both_ways_and_follows_a_drifting_clock():
    offset = Offset()
    offset.received(5.0, 5.1)
    assert offset.seconds is None
    for step in range(3 * WINDOW):
        drift = step * 1e-3
        offset.received(step - drift, step + 1e-4)
        offset.delivered(step, step + 1e-4 - drift)
    assert offset.seconds == pytest.approx(drift, abs=WINDOW * 1e-3)
