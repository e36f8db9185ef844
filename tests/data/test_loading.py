"""The prefetcher: in order, bounded, and gone when its block is left."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.loading import Prefetcher
from shoal.data.source import Batch
from shoal.errors import ShoalError, UserError


class Numbers:
    """Sample i is the number i; a gate may hold fetches back, and one id may be bad."""

    fingerprint = "numbers"

    def __init__(self, bad: int = -1, error: Exception | None = None) -> None:
        self.facts: dict = {}
        self.bad, self.error = bad, error
        self.gate = threading.Event()
        self.gate.set()
        self.fetched: list[int] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 1000

    def fetch(self, ids: np.ndarray, epoch: int) -> Batch:
        assert self.gate.wait(10)
        self.fetched.append(int(ids[0]))
        self.threads.add(threading.current_thread().name)
        if self.bad in ids:
            raise self.error
        return {"input": torch.from_numpy(ids + 1000 * epoch)}


def work(items: int) -> Iterator[tuple[int, np.ndarray, int]]:
    return ((i, np.arange(i, i + 3), i % 2) for i in range(items))


def loaders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shoal-loader")]


@settings(max_examples=15)
@given(items=st.integers(0, 30), ahead=st.integers(0, 5), threads=st.integers(0, 4))
def test_batches_come_in_the_order_of_the_work_whatever_the_threads(items, ahead, threads):
    with Prefetcher(Numbers(), work(items), ahead, threads) as batches:
        given = [(key, batch["input"].tolist()) for key, batch in batches]
    assert given == [(i, [i + 1000 * (i % 2) + k for k in range(3)]) for i in range(items)]
    assert loaders() == []


def test_with_none_ahead_batches_are_fetched_in_the_consumers_thread():
    source = Numbers()
    with Prefetcher(source, work(4), ahead=0, threads=3) as batches:
        next(batches)
        assert source.fetched == [0]
    assert source.threads == {threading.current_thread().name}


def test_a_source_that_draws_from_global_generators_is_never_fetched_in_a_thread():
    source = Numbers()
    source.draws = True
    with Prefetcher(source, work(4), ahead=2, threads=2) as batches:
        assert len(list(batches)) == 4
    assert source.threads == {threading.current_thread().name}


def test_no_more_batches_are_made_ahead_than_asked_for():
    source, taken = Numbers(), []
    noted = (taken.append(item[0]) or item for item in work(50))
    with Prefetcher(source, noted, ahead=3, threads=4) as batches:
        for key, _ in batches:
            assert max(taken) <= key + 3
    assert sorted(source.fetched) == list(range(50))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_fetch_that_fails_raises_at_its_place_and_names_the_samples(threads):
    source = Numbers(bad=7, error=ValueError("torn page"))
    given = []
    with (
        pytest.raises(ShoalError, match=r"cannot load samples 5, 6, 7 of epoch 1: ValueError: torn page") as caught,
        Prefetcher(source, work(20), 4, threads) as batches,
    ):
        given.extend(key for key, _ in batches)
    assert given == [0, 1, 2, 3, 4]
    assert isinstance(caught.value.__cause__, ValueError)
    assert loaders() == []


def test_a_users_mistake_stays_a_users_mistake():
    source = Numbers(bad=2, error=UserError("cannot read 'x.png'."))
    with (
        pytest.raises(UserError, match=r"samples 0, 1, 2 .* cannot read"),
        Prefetcher(source, work(5), 2, 1) as batches,
    ):
        list(batches)


def test_many_samples_are_named_by_their_first_few():
    source = Numbers(bad=2, error=ValueError("x"))
    with (
        pytest.raises(ShoalError, match=r"samples 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(100 in all\)"),
        Prefetcher(source, [(0, np.arange(100), 0)], 2, 1) as batches,
    ):
        list(batches)


def test_work_that_fails_raises_in_its_place():
    def broken() -> Iterator[tuple[int, np.ndarray, int]]:
        yield from work(3)
        raise RuntimeError("no more ids")

    given = []
    with pytest.raises(RuntimeError, match="no more ids"), Prefetcher(Numbers(), broken(), 2, 2) as batches:
        given.extend(key for key, _ in batches)
    assert given == [0, 1, 2]


def test_a_consumer_that_stops_early_leaves_no_thread():
    with Prefetcher(Numbers(), work(10**9), 3, 3) as batches:
        next(batches)
        assert len(loaders()) == 3
    assert loaders() == []
    assert list(batches) == []


def test_time_spent_waiting_is_counted(monkeypatch):
    source, now = Numbers(), [100.0]
    source.gate.clear()

    def clock() -> float:
        source.gate.set()  # the consumer has begun to wait: only now may the fetch go on
        return now[0]

    def slow(ids: np.ndarray, epoch: int) -> Batch:
        batch = Numbers.fetch(source, ids, epoch)
        now[0] += 5.0
        return batch

    source.fetch = slow
    monkeypatch.setattr("shoal.data.loading.time.perf_counter", clock)
    with Prefetcher(source, work(1), 1, 1) as batches:
        next(batches)
        assert batches.waited_s == 5.0
