"""What the backends count themselves comes with a recording: calls, bytes, and whom the rank waited for."""

import time

import pytest
import torch
import torch.distributed as dist

import shoal.comm

BURN_S = 0.05


def _recorded(rank: int, world: int) -> tuple[object, ...]:
    store = dist.distributed_c10d._get_default_store()
    numbers = torch.ones(1 << 16)
    dist.all_reduce(numbers)
    with shoal.comm.record() as r:
        for turn in range(2):
            if rank == 0:
                store.set(f"here {turn}", "")
            else:  # rank 0 is about to wait; be late for certain
                store.wait([f"here {turn}"])
                end = time.monotonic() + BURN_S
                while time.monotonic() < end:
                    continue
            dist.all_reduce(numbers)
    return r.totals, r.waits(), r.exposed_s, r.seconds, r.table(), shoal.comm.group_counters()


def test_a_recording_holds_what_the_backend_of_the_default_group_counted(in_group, is_compiled):
    first, second = in_group(2, _recorded, is_compiled=is_compiled)
    for totals, _, exposed_s, seconds, table, counted in (first, second):
        of = totals["all_reduce", "shared memory"]
        assert (of.calls, of.sent_bytes) == (2, 2 * 4 * (1 << 16))
        assert 0.0 < exposed_s <= seconds
        assert "all_reduce" in table
        assert counted["all_reduce", "shared memory"].calls == 3, "one before the recording"
    assert list(first[1]) == ["rank 1"]
    assert first[1]["rank 1"] >= BURN_S  # of two turns; half of it is left for a busy machine
    assert second[1].get("rank 0", 0.0) < first[1]["rank 1"]


def _over_gloo(rank: int, world: int) -> object:
    with shoal.comm.record() as r:
        dist.all_reduce(torch.ones(4))
    return r.totals


@pytest.mark.parametrize("kind", ["gloo"])
def test_a_backend_that_does_not_count_is_not_made_up(in_group, kind):
    assert in_group(2, _over_gloo, kind=kind) == [{}, {}]
