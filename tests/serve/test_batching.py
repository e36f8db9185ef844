"""The batcher, against arrivals on a made-up clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.batching import GRAIN, MEMORY, Batch, Batcher, ForwardTime, Waiting, padded

ARRIVALS = st.lists(
    st.tuples(
        st.floats(0, 0.05),  # seconds after the one before
        st.integers(1, 3),  # rows
        st.one_of(st.just(0), st.integers(1, 64)),  # tokens
        st.integers(0, 1),  # group
        st.integers(0, 1),  # priority
    ),
    min_size=1,
    max_size=40,
)


def simulate(batcher: Batcher, arrivals: list[Waiting], cost_s: float) -> list[tuple[float, float, Batch]]:
    """(begun, ended, batch): one model that takes ``cost_s`` for each padded token (or row)."""
    free, now, left, log = 0.0, 0.0, list(arrivals), []
    while left or len(batcher):
        due = batcher.next_at(now)
        begin = None if due is None else max(due, free, now)
        if left and (begin is None or left[0].arrived <= begin):
            now = max(now, left[0].arrived)
            batcher.add(left.pop(0))
            continue
        assert begin is not None
        now = begin
        batch = batcher.take(now)
        assert batch is not None, "it said that a batch has to leave"
        spent = cost_s * batch.rows * (batch.length or 1)
        batcher.time.seen(batch.rows * (batch.length or 1), spent)
        free = now + spent
        log.append((now, free, batch))
    return log


def made(rows: list[tuple[float, int, int, int, int]]) -> list[Waiting]:
    now, out = 0.0, []
    for id, (gap, count, length, group, priority) in enumerate(rows):
        now += gap
        out.append(Waiting(id, count, length, (group, length > 0), now, priority))
    return out


@given(ARRIVALS, st.integers(3, 8), st.sampled_from([0.0, 0.02, 0.5]))
def test_every_request_leaves_once_in_a_batch_of_its_own_kind(rows, most_rows, latency_s):
    arrivals = made(rows)
    log = simulate(Batcher(most_rows, latency_s), arrivals, 1e-4)
    by_id = {one.id: one for one in arrivals}
    assert sorted(id for _, _, batch in log for id in batch.ids) == sorted(by_id)
    for _, _, batch in log:
        members = [by_id[id] for id in batch.ids]
        assert len({one.group for one in members}) == 1
        assert batch.rows == sum(one.rows for one in members) <= most_rows
        assert batch.length == padded(max(one.length for one in members))
        assert batch.length % GRAIN == 0
        assert 0 <= batch.padding == sum(one.rows * (batch.length - one.length) for one in members if batch.length)


@given(ARRIVALS, st.integers(3, 8), st.sampled_from([0.0, 0.02, 0.5]))
def test_whoever_must_go_next_goes_next_so_that_nobody_starves(rows, most_rows, latency_s):
    arrivals = made(rows)
    left = {one.id for one in arrivals}
    for begun, _, batch in simulate(Batcher(most_rows, latency_s), arrivals, 1e-4):
        here = [one for one in arrivals if one.id in left and one.arrived <= begun]
        assert min(here, key=lambda one: (-one.priority, one.arrived, one.id)).id in batch.ids
        left -= set(batch.ids)


@given(ARRIVALS, st.integers(3, 8))
def test_a_free_model_never_waits_beyond_the_latency_target(rows, most_rows):
    """The time of a pass is in proportion to its work here, so that it is foretold exactly once it has been seen."""
    arrivals = made([(gap, count, 8, 0, 0) for gap, count, _, _, _ in rows])
    batcher = Batcher(most_rows, 0.02)
    for work in range(8 * 64):
        batcher.time.seen(work, work * 1e-5)
    free = 0.0
    for begun, ended, batch in simulate(batcher, arrivals, 1e-5):
        oldest = min(arrivals[id].arrived for id in batch.ids)
        assert begun <= max(free, oldest + 0.02) + 1e-9
        free = ended


@given(ARRIVALS, st.integers(3, 8))
def test_without_a_target_nothing_waits_for_company(rows, most_rows):
    arrivals, free = made(rows), 0.0
    for begun, ended, batch in simulate(Batcher(most_rows), arrivals, 1e-4):
        assert begun <= max(free, min(arrivals[id].arrived for id in batch.ids)) + 1e-9
        free = ended


@given(ARRIVALS, st.integers(3, 8))
def test_a_full_batch_never_waits(rows, most_rows):
    batcher = Batcher(most_rows, 1000.0)
    for one in made(rows):
        batcher.add(one)
        if sum(w.rows for w in batcher._waiting.values()) >= most_rows:
            assert batcher.next_at(one.arrived) == one.arrived
            batcher.take(one.arrived)


def test_lengths_are_grouped_where_there_is_a_choice():
    batcher = Batcher(4)
    for id, length in enumerate([8, 128, 8, 128, 8, 128, 8, 128]):
        batcher.add(Waiting(id, 1, length, "text", float(id)))
    batches = [batcher.take(10.0) for _ in range(2)]
    assert [batch.ids for batch in batches] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert sum(batch.padding for batch in batches) == 0


def test_a_batcher_that_ignores_lengths_pads_half_of_its_work_away():
    """The planted fault of the test above: everything fits together."""
    batcher = Batcher(4, most_padding=1.0)
    for id, length in enumerate([8, 128, 8, 128]):
        batcher.add(Waiting(id, 1, length, "text", float(id)))
    assert batcher.take(10.0).padding == 240


def test_what_was_dropped_never_leaves():
    batcher = Batcher(4)
    for id in range(3):
        batcher.add(Waiting(id, 1, 0, "x", 0.0))
    assert batcher.drop(1)
    assert not batcher.drop(1)
    assert batcher.take(1.0).ids == (0, 2)
    assert batcher.next_at(1.0) is None


@pytest.mark.parametrize("rows", [0, 5])
def test_a_request_that_fits_no_batch_is_refused(rows):
    with pytest.raises(ValueError, match="do not fit"):
        Batcher(4).add(Waiting(0, rows, 0, "x", 0.0))


def test_the_time_of_a_pass_is_foretold_from_the_nearest_size_seen():
    time = ForwardTime()
    assert time.foretell(100) == 0.0
    time.seen(100, 0.01)
    assert time.foretell(100) == pytest.approx(0.01)
    assert time.foretell(1000) == pytest.approx(0.1)
    for _ in range(20):
        time.seen(100, 0.03)
    assert time.foretell(100) == pytest.approx(0.03, rel=0.01)


@given(
    st.lists(st.tuples(st.floats(0.0, 0.2), st.integers(1, 3)), min_size=1, max_size=12),
    st.sampled_from([0.0, 1e-3, 1e-2]),
)
def test_who_would_be_answered_too_late_does_not_go_and_no_one_else_stays(urgent, cost_s):
    batcher = Batcher(64)
    if cost_s:
        batcher.time.seen(1, cost_s)
    for id, (deadline, rows) in enumerate(urgent):
        batcher.add(Waiting(id, rows, 0, 0, 0.0, 0, deadline))
    batch = batcher.take(0.05)
    assert batch is not None
    assert sorted(batch.ids + batch.late) == list(range(len(urgent)))
    rows = {id: urgent[id][1] for id in batch.ids}
    assert batch.rows == batch.tokens == sum(rows.values())
    if len(rows) > 1:
        assert min(urgent[id][0] for id in rows) >= 0.05 + cost_s * batch.rows
    together = batch.rows
    for id in reversed(batch.late):
        together += urgent[id][1]
        assert urgent[id][0] < 0.05 + cost_s * together, "it would have been late in their company"
    if not batch.ids:
        assert all(deadline < 0.05 for deadline, _ in urgent), "the last one goes, or is late already"


def test_times_between_two_sizes_lie_on_a_line_and_beyond_them_in_proportion():
    time = ForwardTime()
    time.seen(4, 0.3)
    time.seen(16, 0.9)
    assert [time.foretell(work) for work in (2, 4, 10, 16, 32)] == pytest.approx([0.15, 0.3, 0.6, 0.9, 1.8])


def test_a_size_that_was_slow_once_and_did_not_come_again_is_forgotten():
    time = ForwardTime()
    time.seen(16, 10.0)
    for _ in range(MEMORY):
        time.seen(4, 0.1)
    assert time.foretell(16) == pytest.approx(0.4)
