"""Exchanges of real workers count what they really do: bytes, whom they waited for, and nothing twice."""

import os
import time

import pytest
import torch

from shoal.comm.accounting.counters import Total
from shoal.comm.accounting.recording import record
from shoal.comm.accounting.telling import transport
from shoal.comm.exchange import Placement, Terms
from shoal.comm.layout import BLOCK, flat_layout
from shoal.comm.status import Phase
from shoal.comm.transport import make_exchange

BURN_S = 0.02
BUCKETS = 3


def _exchange(group, ownership, fast=False):
    layout = flat_layout([BLOCK * 2 * BUCKETS], [], len(ownership), BLOCK * 2)
    placement = Placement(ownership, group.rank, fast=fast)
    passes = (1,) * ownership[-1].stop
    cpu = torch.device("cpu")
    terms = Terms(layout, placement, passes, 2, lambda facts: (1.0, 1.0), torch.float32, cpu)
    return make_exchange(group, terms), passes


def _step(group, exchange, passes, number, before_post=lambda bucket: None):
    group.report(Phase.loading, step=number)
    exchange.begin(passes)
    group.report(Phase.backward)
    exchange.claim()
    for partial in exchange.partials:
        partial.fill_(1.0)
    for bucket in range(len(exchange.layout.buckets)):
        before_post(bucket)
        exchange.post()
        exchange.advance()
    group.report(Phase.exchanging)
    begun = time.monotonic()
    exchange.finish()
    return time.monotonic() - begun


def _burn(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        continue


def _until_others_wait(group):
    """Wait until every other worker stands still for this one."""
    others = [rank for rank in range(group.world) if rank != group.rank]

    def waits(at):
        return at.phase is Phase.waiting and at.peer == group.rank

    while not all(waits(group.report.board.read(rank)) for rank in others):
        continue


def _counted(group, ownership, steps):
    exchange, passes = _exchange(group, ownership)
    stood = sum(_step(group, exchange, passes, number) for number in range(1, steps + 1))
    rows = [exchange.account.form.read(row) for row in exchange.rows] if group.rank == 0 else []
    return group.counters.totals(), rows, stood, len(exchange.layout.buckets)


@pytest.mark.parametrize("ownership", [(range(0, 4), range(4, 8)), (range(0, 5), range(5, 8))])
def test_shared_memory_counts_the_partial_sums_that_each_reads_of_the_others(on_workers, ownership):
    steps, slices = 3, BLOCK * 4 * BUCKETS
    results = on_workers(2, _counted, ownership, steps)
    partials = [Placement(ownership, 0, fast=False).partials((1,) * 8)[rank] for rank in (0, 1)]
    for rank, (totals, _, stood, buckets) in enumerate(results):
        of = totals["reduce-scatter", "shared memory"]
        assert of.calls == steps * buckets
        assert of.sent_bytes == steps * partials[rank] * slices
        assert of.received_bytes == steps * partials[1 - rank] * slices
        inside = of.exposed_s + totals["barrier", "shared memory"].exposed_s
        assert inside <= stood * (1 + 1e-6)


def test_rank_0_learns_what_every_worker_had_counted_up_to_the_step_before(on_workers):
    ownership, steps = (range(0, 2), range(2, 4), range(4, 6)), 4
    results = on_workers(3, _counted, ownership, steps)
    rows = results[0][1]
    assert [row.steps for row in rows] == [steps - 1] * 3
    for row, (totals, *_) in zip(rows, results, strict=True):
        last = totals["reduce-scatter", "shared memory"]
        told = row.totals["reduce-scatter", "shared memory"]
        assert told.sent_bytes * steps == last.sent_bytes * (steps - 1)
        assert 0.0 < told.hidden_s + told.exposed_s < last.hidden_s + last.exposed_s


def _straggling(group, late, steps):
    """One worker hands over its last bucket only when it has seen the others stand still, and then some."""
    ownership = tuple(range(2 * rank, 2 * rank + 2) for rank in range(group.world))
    exchange, passes = _exchange(group, ownership)

    def hold(bucket):
        if group.rank == late and bucket == len(exchange.layout.buckets) - 1:
            _until_others_wait(group)
            _burn(BURN_S)

    for number in range(1, steps + 1):
        _step(group, exchange, passes, number, hold)
    return group.counters.totals()


@pytest.mark.parametrize("late", [0, 2])
def test_a_worker_that_comes_late_is_the_one_that_is_waited_for(on_workers, late):
    steps = 4
    results = on_workers(3, _straggling, late, steps)
    for rank, totals in enumerate(results):
        waits = totals["reduce-scatter", "shared memory"].waits
        assert waits[rank] == 0.0
        if rank != late:
            assert waits[late] >= BURN_S  # of one step at least: in the others it may have been seen waiting elsewhere
            assert waits[late] > sum(waits) - waits[late]


def _recorded(group, folder):
    ownership = (range(0, 2), range(2, 4))
    exchange, passes = _exchange(group, ownership)
    _step(group, exchange, passes, 1)
    with record() as r:
        for number in (2, 3):
            _step(group, exchange, passes, number)
    after = len(group.counters.spans)
    _step(group, exchange, passes, 4)
    file = r.chrome_trace(os.path.join(folder, f"{group.rank}.json"))
    return r.totals, r.exposed_s, r.seconds, r.table(), file.read_text(), len(group.counters.spans) - after


def test_a_recording_holds_its_own_steps_and_no_others(on_workers, tmp_path):
    import json

    for totals, exposed_s, seconds, table, trace, later in on_workers(2, _recorded, str(tmp_path)):
        of = totals["reduce-scatter", "shared memory"]
        assert of.calls == 2 * BUCKETS
        assert of.sent_bytes == 2 * BUCKETS * BLOCK * 4
        assert 0.0 < exposed_s < seconds
        assert "reduce-scatter  shared memory" in table
        assert later == 0, "spans are kept while somebody records"
        spans = [event for event in json.loads(trace)["traceEvents"] if event["ph"] == "X"]
        assert {event["name"] for event in spans} >= {"reducing", "backward", "on its way"}
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)


# --- over torch.distributed ----------------------------------------------------------------------------------------


def _joined(group, fast, ownership, late, clocks, hosts=()):
    """The same workers, as torchrun would have started them."""
    import socket

    import shoal.comm.distributed as module

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(group.gather(str(free.getsockname()[1]).encode())[0])
    os.environ |= {"RANK": str(group.rank), "WORLD_SIZE": str(group.world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if clocks:  # another name for the clock: its offset must be found
        module.clock_name = lambda: f"clock {group.rank}"
    joined = module.DistributedGroup(60.0, accelerator=False)
    joined.host = hosts[group.rank] if hosts else joined.host
    joined.report.board = board = group.report.board
    exchange, passes = _exchange(joined, ownership, fast=fast)

    def hold(bucket):
        if group.rank == late and bucket == len(exchange.layout.buckets) - 1:
            while not (board.read(0).phase is Phase.exchanging and board.read(0).step == joined.report.position.step):
                continue
            _burn(BURN_S)

    for number in range(1, 5):
        _step(joined, exchange, passes, number, hold)
    totals, rows = joined.counters.totals(), [exchange.account.form.read(row) for row in exchange.rows]
    offsets = {rank: (offset.seconds, offset.error_s) for rank, offset in exchange.account.offsets.items()}
    group.gather(b"")
    joined.close()
    return totals, rows, offsets, transport(exchange.account)


def test_all_to_all_and_all_gather_count_what_they_send_to_each_peer(on_workers):
    ownership = (range(0, 5), range(5, 8))
    counts = Placement(ownership, 0, fast=False).partials((1,) * 8)
    slices = 4 * BUCKETS * BLOCK * 4
    for rank, (totals, rows, *_) in enumerate(on_workers(2, _joined, False, ownership, 1, False)):
        scatter, gather = totals["reduce-scatter", "tcp"], totals["all-gather", "tcp"]
        assert (scatter.sent_bytes, scatter.received_bytes) == (counts[rank] * slices, counts[1 - rank] * slices)
        assert (gather.sent_bytes, gather.received_bytes) == (slices, slices)
        assert [row.steps for row in rows] == [3, 3]
        if rank == 0:
            assert scatter.waits[1] >= 4 * BURN_S * 0.5  # but for what passes between the word and the deed
            assert scatter.waits[0] == 0.0


def test_an_all_reduce_counts_as_a_ring_and_clocks_of_other_hosts_are_told_together(on_workers):
    ownership = (range(0, 2), range(2, 4))
    for rank, (totals, _, offsets, _) in enumerate(on_workers(2, _joined, True, ownership, 1, True)):
        of = totals["all-reduce", "tcp"]
        assert of.sent_bytes == of.received_bytes == 4 * BUCKETS * 2 * BLOCK * 4  # 2 (n - 1) / n of each bucket
        seconds, error_s = offsets[1 - rank]
        assert abs(seconds) <= error_s + 1e-6, "in truth it is one clock"


def test_what_goes_to_other_hosts_is_told_from_what_stays(on_workers):
    ownership = tuple(range(2 * rank, 2 * rank + 2) for rank in range(3))
    for rank, (totals, *_, told) in enumerate(on_workers(3, _joined, False, ownership, 1, False, ("a", "b", "b"))):
        far, near = (totals.get(("reduce-scatter", f"tcp {where}")) for where in ("between hosts", "in a host"))
        each = 4 * 2 * BLOCK * 4  # of the own partial sum, in four steps: a third of six blocks for every worker
        assert far.sent_bytes == (2 if rank == 0 else 1) * each
        assert near.sent_bytes == (0 if rank == 0 else far.sent_bytes)
        assert told["hosts"] == [0, 1, 1]
        assert told["latency_s"] > 0


def test_the_backend_of_a_group_counts_for_a_recording_too():
    from shoal.comm.accounting.recording import native_total

    raw = {"calls": 3, "bytes": 100, "zero_copy_calls": 1, "moving_s": 0.2, "waiting_s": {1: 0.3}}
    assert native_total(raw, 2) == Total(3, 100, 100, (0.0, 0.0, 0.0, 0.0), (0.0, 0.3, 0.2, 0.0), waits=(0.0, 0.3))
    half = native_total({**raw, "standing_s": 0.25}, 2)
    assert half.hidden_s == pytest.approx(half.exposed_s)
