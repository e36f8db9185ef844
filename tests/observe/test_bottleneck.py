"""What holds a run up is named: each planted cause, by its own name and rank, and nothing where nothing is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_traffic import MB, run

from shoal.observe.bottleneck import NOTABLE, bottleneck, evidence, stragglers
from shoal.observe.communication import read_communication


def found(**planted):
    c = read_communication(run(**planted))
    assert c is not None
    return bottleneck(c)


FOUR = {"placement": (2, 2, 2, 2), "loading": (0.0,) * 4, "updating": (0.0,) * 4}


def waits_for(rank: int, seconds: float, workers: int = 4) -> list[list[float]]:
    return [[seconds if peer == rank != mine else 0.0 for peer in range(workers)] for mine in range(workers)]


def test_a_run_that_only_computes_is_limited_by_computing():
    named = found(compute=(0.097, 0.098), transferring=0.001)
    assert named.kind == "compute"
    assert named.sentence == (
        "Computing takes 97.5 % of a step and is what limits it: for communication the workers stand still "
        "1 ms (1.0 %)."
    )


@pytest.mark.parametrize("late", range(4))
def test_a_slow_worker_is_named_with_its_time_against_that_of_the_others(late):
    compute = [0.09 if rank == late else 0.05 for rank in range(4)]
    named = found(**FOUR, compute=compute, waits=waits_for(late, 0.04))
    assert (named.kind, named.ranks) == ("straggler", (late,))
    assert f"The others stand still 40 ms (40.0 %) of each step for rank {late}: " in named.sentence
    assert "it needs 90 ms for its forward and backward passes where the others need 50 ms." in named.sentence


def test_a_worker_that_owns_more_of_the_work_is_told_so():
    named = found(placement=(5, 3), compute=(0.09, 0.06), waits=((0.0, 0.0), (0.03, 0.0)))
    assert (named.kind, named.ranks) == ("straggler", (0,))
    assert named.sentence.endswith("where the others need 60 ms, and it owns 5 of 8 shards.")


@pytest.mark.parametrize("late", range(4))
def test_the_loader_of_one_worker_is_told_from_a_slow_worker(late):
    loading = [0.04 if rank == late else 0.001 for rank in range(4)]
    planted = {**FOUR, "loading": loading}
    named = found(**planted, compute=(0.05,) * 4, waits=waits_for(late, 0.039))
    assert (named.kind, named.ranks) == ("loader", (late,))
    assert named.sentence.startswith(f"The data of rank {late} comes late: the others stand still 39 ms")
    assert "which waits 40 ms for its batches where the others wait 1 ms." in named.sentence


def test_a_worker_that_comes_late_from_its_update_is_told_so():
    planted = {**FOUR, "updating": (0.0, 0.0, 0.0, 0.04)}
    named = found(**planted, compute=(0.05,) * 4, waits=waits_for(3, 0.04))
    assert (named.kind, named.ranks) == ("straggler", (3,))
    assert "late from its update" in named.sentence


def test_workers_that_are_late_in_turns_are_not_called_stragglers():
    waits = [[0.0 if mine == peer else 0.01 for peer in range(4)] for mine in range(4)]
    named = found(**FOUR, compute=(0.06,) * 4, waits=waits)
    assert (named.kind, named.ranks) == ("turns", ())


def test_data_that_is_late_everywhere_is_nobodys_fault():
    named = found(compute=(0.06, 0.06), loading=(0.03, 0.04))
    assert named.kind == "loading"
    assert "30 ms (30.0 %)" in named.sentence


def test_a_slow_link_is_named_with_bytes_and_rate():
    named = found(compute=(0.05, 0.05), transferring=0.04, sent=40 * MB, latency_s=0.0)
    assert named.kind == "bandwidth"
    assert "each worker sends 40 MB a step over tcp, at 1 GB/s, and stands still 40 ms (40.0 %)" in named.sentence


def test_many_small_buckets_are_told_from_a_slow_link():
    named = found(compute=(0.05, 0.05), transferring=0.04, buckets=100, bucket_bytes=MB // 100, latency_s=3e-4, sent=MB)
    assert named.kind == "latency"
    assert "100 operations a step carry 10 kB each, and each needs 0.3 ms" in named.sentence


def test_between_workers_who_share_memory_late_news_is_no_link():
    named = found(compute=(0.05, 0.05), transferring=0.04, link="shared memory")
    assert named.kind == "latency"
    assert "more workers than free cores" in named.sentence


def test_adding_up_after_the_backward_pass_is_named():
    assert found(compute=(0.05, 0.05), reducing=0.04).kind == "reducing"


@pytest.mark.parametrize("server", [0, 1])
def test_a_server_that_answers_late_is_named(server):
    waits = [[0.0, 0.0, *(0.03 if k == server else 0.001 for k in range(2))] for _ in range(2)]
    named = found(compute=(0.05, 0.05), operation="push", waits=waits)
    assert (named.kind, named.ranks) == ("server", (server,))
    assert f"until server {server} can answer" in named.sentence


def test_of_two_losses_the_larger_one_is_named():
    both = {"compute": (0.05, 0.05), "latency_s": 0.0}
    assert found(**both, transferring=0.02, loading=(0.03, 0.03)).kind == "loading"
    assert found(**both, transferring=0.03, loading=(0.02, 0.02)).kind == "bandwidth"


@given(st.floats(0.0, NOTABLE * 0.099), st.floats(0.0, NOTABLE * 0.099), st.floats(0.0, NOTABLE * 0.099))
def test_a_loss_below_a_twentieth_of_a_step_has_no_name(transfer, load, skew):
    named = found(transferring=transfer, loading=(load, load), waits=((0.0, skew), (skew, 0.0)))
    assert named.kind == "compute"


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=40))
def test_stragglers_are_few_and_hold_most_of_the_blame(blame):
    late = stragglers(blame)
    assert len(late) <= max(1, len(blame) // 3)
    if late:
        assert sum(blame[rank] for rank in late) >= 0.6 * sum(blame) * (1 - 1e-9)
        least = min(blame[rank] for rank in late)
        assert all(value <= least for rank, value in enumerate(blame) if rank not in late)


def test_evidence_is_in_seconds_of_the_mean_worker():
    c = read_communication(run(compute=(0.04, 0.06), loading=(0.0, 0.02), transferring=0.02, hidden=0.01))
    spent = dict(evidence(c))
    assert spent["computing"] == pytest.approx(0.05)
    assert spent["loading"] == pytest.approx(0.01)
    assert spent["transferring"] == pytest.approx(0.02)
    assert spent["hidden communication"] == pytest.approx(0.01)
