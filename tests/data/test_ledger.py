"""The sample ledger's laws: each id exactly once an epoch, whoever asks and in whatever order."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.ledger import Ledger, permutation
from shoal.errors import UserError


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    shards, micro = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    batch = shards * micro * draw(st.integers(1, 5))
    return Ledger(draw(st.integers(1, 400)), batch, shards, micro, draw(st.integers(0, 2**40)))


def committed(ledger: Ledger, steps: range) -> list[dict]:
    events = []
    for step in steps:
        epoch, index = ledger.position(step)
        fields = {"step": step + 1, "epoch": epoch, "index": index, "samples": len(ledger.ids(step))}
        events.append({"event": "committed", **fields})
    return events


@given(ledgers(), st.integers(0, 3))
def test_each_id_comes_exactly_once_an_epoch(ledger, epoch):
    steps = range(epoch * ledger.steps_per_epoch, (epoch + 1) * ledger.steps_per_epoch)
    parts = [ids for step in steps for shard in range(ledger.shards) for ids in ledger.shard(step, shard)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(ledger.samples))


@given(ledgers())
def test_shards_joined_in_order_are_the_global_batch(ledger):
    for step in range(ledger.steps_per_epoch):
        parts = [ids for shard in range(ledger.shards) for ids in ledger.shard(step, shard)]
        assert np.array_equal(np.concatenate(parts), ledger.ids(step))
        assert len(ledger.ids(step)) == sum(ledger.counts(step))


@given(ledgers())
def test_full_batches_are_cut_into_equal_micro_batches(ledger):
    size = ledger.batch // ledger.shards // ledger.micro_batches
    for step in range(ledger.samples // ledger.batch):
        for shard in range(ledger.shards):
            assert [len(ids) for ids in ledger.shard(step, shard)] == [size] * ledger.micro_batches


@given(ledgers())
def test_a_tail_is_spread_evenly_over_a_prefix_of_the_shards(ledger):
    for step in range(ledger.steps_per_epoch):
        counts = ledger.counts(step)
        assert max(counts) - min(counts) <= 1
        assert counts[0] > 0
        assert list(counts) == sorted(counts, reverse=True)
        assert ledger.present(step) == tuple(bool(ledger.shard(step, shard)) for shard in range(ledger.shards))
        assert all(len(ids) for shard in range(ledger.shards) for ids in ledger.shard(step, shard))


@given(ledgers(), st.data())
def test_the_answer_does_not_depend_on_who_asks_or_in_which_order(ledger, data):
    steps = list(range(2 * ledger.steps_per_epoch))
    expected = [ledger.ids(step).tobytes() for step in steps]
    for step in data.draw(st.permutations(steps)):
        again = Ledger(ledger.samples, ledger.batch, ledger.shards, ledger.micro_batches, ledger.seed)
        assert again.ids(step).tobytes() == expected[step]


def test_threads_that_ask_at_once_get_the_same_ids():
    ledger = Ledger(5000, 64, 8, 2, seed=3)
    steps = [step * 17 % 400 for step in range(400)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda step: ledger.ids(step).tobytes(), steps))
    assert answers == [ledger.ids(step).tobytes() for step in steps]


@given(ledgers())
def test_the_number_of_shards_does_not_change_the_global_batch(ledger):
    alone = Ledger(ledger.samples, ledger.batch, 1, 1, ledger.seed)
    assert all(np.array_equal(alone.ids(step), ledger.ids(step)) for step in range(ledger.steps_per_epoch))


def test_epochs_and_seeds_have_orders_of_their_own():
    ledger = Ledger(1000, 1000, 1, 1, seed=0)
    orders = {ledger.ids(0).tobytes(), ledger.ids(1).tobytes(), Ledger(1000, 1000, 1, 1, seed=1).ids(0).tobytes()}
    assert len(orders) == 3


def test_the_order_never_changes_with_the_version_of_numpy():
    digest = hashlib.sha256(permutation(60_000, "shoal.ledger", 7, 2).astype("<i8").tobytes()).hexdigest()
    assert digest == "d7fd3586e1ea188e07a48367fd82c16c5a1c3ee082af01290a5fd25a12b6a4ea"
    assert permutation(8, "shoal.ledger", 0, 0).tolist() == [6, 2, 5, 7, 0, 1, 4, 3]


def test_handed_out_ids_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        Ledger(10, 5, 1, 1, 0).ids(0)[0] = 99


def test_an_indivisible_batch_is_refused_with_both_numbers():
    with pytest.raises(UserError, match="batch 10 is not divisible by 4 shards x 1"):
        Ledger(100, 10, 4, 1, 0)
    with pytest.raises(UserError, match="no samples"):
        Ledger(0, 4, 4, 1, 0)


@settings(max_examples=25)
@given(ledgers(), st.integers(0, 40))
def test_a_clean_log_is_proved_and_the_open_ids_are_those_still_to_come(ledger, steps):
    account = ledger.verify(committed(ledger, range(steps)))
    assert account.wrong == ()
    assert account.steps == steps
    epoch, index = ledger.position(steps)
    assert account.epochs == epoch
    rest = [ledger.ids(epoch * ledger.steps_per_epoch + i) for i in range(index, ledger.steps_per_epoch)]
    assert np.array_equal(account.open, np.concatenate(rest))


def test_a_skipped_step_is_named():
    ledger = Ledger(100, 8, 4, 1, 0)
    events = committed(ledger, range(10))
    del events[4:6]
    (wrong,) = ledger.verify(events).wrong
    assert (wrong.kind, wrong.step) == ("skipped", 5)
    assert "steps 5 to 6 were never committed" in wrong.text


def test_a_doubled_step_is_named():
    ledger = Ledger(100, 8, 4, 1, 0)
    events = committed(ledger, range(10))
    (wrong,) = ledger.verify([*events, events[3]]).wrong
    assert (wrong.kind, wrong.step) == ("doubled", 4)


def test_a_step_with_a_sample_too_few_is_named():
    ledger = Ledger(100, 8, 4, 1, 0)
    events = committed(ledger, range(3))
    events[1]["samples"] = 7
    (wrong,) = ledger.verify(events).wrong
    assert (wrong.kind, wrong.step) == ("miscounted", 2)


def test_a_step_at_the_wrong_place_of_its_epoch_is_named():
    ledger = Ledger(100, 8, 4, 1, 0)
    events = committed(ledger, range(20))
    events[15]["index"] = 0
    (wrong,) = ledger.verify(events).wrong
    assert (wrong.kind, wrong.step) == ("misplaced", 16)


@given(ledgers(), st.data())
def test_a_log_with_any_one_event_lost_or_repeated_is_never_proved(ledger, data):
    events = committed(ledger, range(12))
    at = data.draw(st.integers(0, 10))
    assert ledger.verify(events[:at] + events[at + 1 :]).wrong
    assert ledger.verify([*events[:at], events[at], *events[at:]]).wrong


def test_a_step_before_the_first_is_named():
    (doubled, misplaced) = Ledger(100, 8, 4, 1, 0).verify([{"event": "committed", "step": 0}]).wrong
    assert (doubled.kind, misplaced.text) == ("doubled", "there is no step 0: the first is 1")


def test_steps_undone_by_a_resume_may_be_committed_again():
    ledger = Ledger(100, 8, 4, 1, 0)
    resumed = {"event": "resumed", "step": 6, "checkpoint": "step-6", "skipped": []}
    account = ledger.verify([*committed(ledger, range(9)), resumed, *committed(ledger, range(6, 12))])
    assert (account.wrong, account.steps) == ((), 12)


def test_a_resume_beyond_the_last_commit_is_a_skipped_step():
    ledger = Ledger(100, 8, 4, 1, 0)
    account = ledger.verify([*committed(ledger, range(3)), {"event": "resumed", "step": 5}])
    assert [wrong.kind for wrong in account.wrong] == ["skipped"]
