"""A batch that changes in the run: each id still comes exactly once an epoch, and the log still proves it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.ledger import Ledger
from shoal.errors import UserError


@st.composite
def changing(draw: st.DrawFn) -> Ledger:
    shards, micro = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    sizes = st.integers(1, 6).map(lambda times: times * shards * micro)
    steps = draw(st.lists(st.integers(0, 60), unique=True, max_size=5).map(sorted))
    ledger = Ledger(draw(st.integers(1, 200)), draw(sizes), shards, micro, draw(st.integers(0, 99)))
    return replace(ledger, changes=tuple((step, draw(sizes)) for step in steps))


def told(ledger: Ledger, steps: range) -> list[dict]:
    """What a run's log says of these steps, counted from 0, and of the changes after each."""
    changes, events = dict(ledger.changes), []
    for step in steps:
        epoch, index = ledger.position(step)
        if step + 1 in changes:
            events.append({"event": "rebatched", "step": step + 1, "batch": changes[step + 1]})
        fields = {"step": step + 1, "epoch": epoch, "index": index, "samples": len(ledger.ids(step))}
        events.append({"event": "committed", **fields})
    return events


@given(changing(), st.integers(1, 3))
def test_each_id_comes_exactly_once_an_epoch_whatever_the_batches(ledger, epochs):
    steps = ledger.steps_in(epochs)
    parts = [ids for step in range(steps) for shard in range(ledger.shards) for ids in ledger.shard(step, shard)]
    ids = np.concatenate(parts).reshape(epochs, ledger.samples)
    assert all(sorted(epoch.tolist()) == list(range(ledger.samples)) for epoch in ids)
    assert [step for step in range(steps) if ledger.ends_epoch(step)][-1] == steps - 1
    assert sum(ledger.ends_epoch(step) for step in range(steps)) == epochs


@given(changing())
def test_the_order_of_an_epoch_does_not_depend_on_the_batches(ledger):
    fixed = replace(ledger, changes=())
    ours = np.concatenate([ledger.ids(step) for step in range(ledger.steps_in(2))])
    assert np.array_equal(ours, np.concatenate([fixed.ids(step) for step in range(fixed.steps_in(2))]))


@given(changing(), st.integers(0, 80))
def test_a_step_has_the_batch_that_was_last_said_and_full_shards(ledger, step):
    batch = next((size for first, size in reversed(ledger.changes) if first <= step), ledger.batch)
    assert ledger.batch_of(step) == batch
    assert len(ledger.ids(step)) == batch or ledger.ends_epoch(step)
    assert ledger.seen(step) + len(ledger.ids(step)) == ledger.seen(step + 1)
    if len(ledger.ids(step)) == batch:
        assert {len(ids) for s in range(ledger.shards) for ids in ledger.shard(step, s)} == {
            batch // ledger.shards // ledger.micro_batches
        }


@given(changing(), st.integers(0, 60), st.integers(1, 6))
def test_what_is_changed_later_leaves_earlier_steps_as_they_were(ledger, done, times):
    changed = ledger.changed(done, times * ledger.shards * ledger.micro_batches)
    assert all(np.array_equal(changed.ids(step), ledger.ids(step)) for step in range(done))
    assert changed.changes[-1][0] == done
    assert changed.before(done) == ledger.before(done)


@given(changing())
def test_a_log_with_its_changes_proves_every_epoch(ledger):
    ledger = replace(ledger, changes=tuple(change for change in ledger.changes if change[0] > 0))
    steps = ledger.steps_in(2)
    account = replace(ledger, changes=()).verify(told(ledger, range(steps)))
    assert account.wrong == ()
    assert account.epochs == 2
    assert len(account.open) == ledger.samples


def test_a_change_that_the_log_leaves_out_or_that_was_not_made_is_found():
    ledger = Ledger(100, 8, 4, 1, 0, changes=((5, 16),))
    events = told(ledger, range(9))
    plain = replace(ledger, changes=())
    left_out = [event for event in events if event["event"] == "committed"]
    assert plain.verify(left_out).wrong[0].kind == "miscounted"
    assert plain.verify(left_out).wrong[0].step == 6
    made_up = [*events[:2], {"event": "rebatched", "step": 2, "batch": 4}, *events[2:]]
    assert plain.verify(made_up).wrong[0].step == 3
    assert plain.verify(events).wrong == ()


def test_changes_that_were_thrown_away_with_their_steps_do_not_count():
    first, second = (
        Ledger(100, 8, 4, 1, 0, changes=((3, 16), (6, 8))),
        Ledger(100, 8, 4, 1, 0, changes=((3, 16), (5, 12))),
    )
    events = [*told(first, range(8)), {"event": "resumed", "step": 4}, *told(second, range(4, 9))]
    account = Ledger(100, 8, 4, 1, 0).verify(events)
    assert account.wrong == ()
    assert account.ledger == second
    branched = [{"event": "branched", "step": 4, "batches": [[3, 16]]}, *told(second, range(4, 9))]
    assert Ledger(100, 8, 4, 1, 0).verify(branched).wrong == ()


def test_changes_that_shards_do_not_divide_or_that_go_back_are_refused():
    with pytest.raises(UserError, match="batch 10 is not divisible by 4 shards"):
        Ledger(100, 8, 4, 1, 0).changed(3, 10)
    with pytest.raises(UserError, match="must go up"):
        Ledger(100, 8, 4, 1, 0, changes=((5, 8), (5, 16)))
