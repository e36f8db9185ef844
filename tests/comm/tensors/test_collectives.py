"""Tensor collectives, held to the same claims in C++ and in Python on one host, and over torch.distributed."""

import os
import random
import signal
import time

import cloudpickle
import pytest
import torch
import torchrun_workers

from shoal.comm.mesh import OutOfStep, PeerLost
from shoal.comm.native import build
from shoal.comm.status import Phase
from shoal.comm.tensors import make_collectives
from shoal.comm.tensors.messages import CHUNK
from shoal.comm.tensors.native import RING
from shoal.errors import RunFailed, UserError

KINDS = ["C++", "Python", "torch.distributed"]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def in_kind(group, kind, function, *arguments):
    """Run the function in the same workers, with or without the library, or as torchrun would have started them."""
    if kind != "torch.distributed":
        os.environ["SHOAL_NATIVE"] = "1" if kind == "C++" else "0"
        return function(group, *arguments)
    return torchrun_workers.as_torchrun(group, function, *arguments)


@pytest.fixture(params=KINDS)
def on_kind(request, on_workers):
    if request.param == "C++" and build.ranks() is None:
        pytest.skip(build.why_not(("ranks",)))
    cloudpickle.register_pickle_by_value(torchrun_workers)
    return lambda workers, function, *arguments: on_workers(workers, in_kind, request.param, function, *arguments)


def values(shape, dtype, *seed, transposed=False):
    """The same on every rank; with transposed, not contiguous."""
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    laid = tuple(reversed(shape)) if transposed else tuple(shape)
    if dtype in FLOATS:
        made = torch.randn(laid, generator=generator).to(dtype)
    else:
        made = torch.randint(0, 100, laid, generator=generator).to(dtype)
    return made.permute(*reversed(range(len(shape)))) if transposed else made


def in_rank_order(tensors):
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    total = torch.zeros_like(tensors[0], dtype=torch.float32) if half else tensors[0].clone()
    for tensor in tensors if half else tensors[1:]:
        total = total + tensor
    return total.to(tensors[0].dtype)


def equal(found, expected):
    return found.dtype == expected.dtype and torch.equal(found, expected)


def sweep(group, cases, most):
    """Random requests; those whose answer is not exactly what one process computes."""
    collectives = make_collectives(group)
    rank, world = group.rank, group.world
    wrong = []
    for case in range(cases):
        dice = random.Random(1000 * world + case)
        dtype, transposed = dice.choice(FLOATS + WHOLE), dice.random() < 0.3
        shape = [dice.choice([0, 1, 2, 3, 5, 8]) if dice.random() < 0.2 else dice.randint(1, most) for _ in range(3)]
        dim = dice.randrange(3)
        sizes = [dice.randint(0, most) for _ in range(world)]
        root = dice.randrange(world)

        def cut(size, shape=shape, dim=dim):
            return [*shape[:dim], size, *shape[dim + 1 :]]

        inputs = [values(shape, dtype, case, r, transposed=transposed) for r in range(world)]
        uneven = [values(cut(sizes[r]), dtype, case, r, transposed=transposed) for r in range(world)]
        whole = [values(cut(sum(sizes)), dtype, case, r, transposed=transposed) for r in range(world)]
        before = inputs[rank].clone()
        parts = [[values((r, to + 1, dice.randint(0, 3)), dtype, case, r, to) for to in range(world)]
                 for r in range(world)]  # fmt: skip
        whole_sum = in_rank_order(whole)
        signed = dim - 3 if dice.random() < 0.3 else dim
        laid_out = collectives.all_reduce(inputs[rank]).is_contiguous() or world == 1
        checks = {
            "contiguous": laid_out,
            "all_reduce": equal(collectives.all_reduce(inputs[rank]), in_rank_order(inputs)),
            "all_gather": equal(collectives.all_gather(inputs[rank], signed), torch.cat(inputs, dim)),
            "uneven all_gather": equal(collectives.all_gather(uneven[rank], signed, sizes), torch.cat(uneven, dim)),
            "uneven reduce_scatter": equal(
                collectives.reduce_scatter(whole[rank], signed, sizes), whole_sum.split(sizes, dim)[rank].contiguous()
            ),
            "all_to_all": all(
                equal(found, parts[r][rank]) for r, found in enumerate(collectives.all_to_all(parts[rank]))
            ),
            "broadcast": torch.equal(collectives.broadcast(inputs[rank], root), inputs[root]),
            "nothing that came in was written": torch.equal(inputs[rank], before),
        }
        even = values(cut(2 * world), dtype, case, rank)
        evens = in_rank_order([values(cut(2 * world), dtype, case, r) for r in range(world)])
        checks["reduce_scatter"] = equal(collectives.reduce_scatter(even, dim), evens.split(2, dim)[rank].contiguous())
        if world > 1:
            collectives.send(inputs[rank], (rank + 1) % world)
            origin = (rank - 1) % world
            like = inputs[origin] if case % 2 else (inputs[origin].shape, dtype)
            checks["send and recv"] = equal(collectives.recv(like, origin), inputs[origin].contiguous())
        collectives.barrier()
        wrong += [(case, name, dtype, shape, dim, sizes) for name, right in checks.items() if not right]
    return wrong


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_collective_gives_what_one_process_computes_for_any_type_shape_dim_and_sizes(on_kind, world):
    assert on_kind(world, sweep, 12, 6) == [[]] * world


def large(group):
    """More than what lies ready at a time, of types whose elements and parts do not end where pieces do."""
    collectives, rank, world = make_collectives(group), group.rank, group.world
    wrong = []
    for dtype, count in [(torch.float32, 1_300_001), (torch.bfloat16, 3_000_001), (torch.uint8, RING + 3)]:
        inputs = [values((count,), dtype, r) for r in range(world)]
        total = in_rank_order(inputs)
        sizes = [CHUNK // dtype.itemsize + 5, *[0] * (world - 2), count - CHUNK // dtype.itemsize - 5]
        collectives.send(inputs[rank], (rank + 1) % world)
        parts = inputs[rank].split(sizes)
        uneven = torch.cat([i.split(sizes)[r] for r, i in enumerate(inputs)])
        got = collectives.all_to_all(parts)
        checks = [
            equal(collectives.recv(inputs[rank], (rank - 1) % world), inputs[rank - 1]),
            equal(collectives.all_reduce(inputs[rank]), total),
            equal(collectives.all_gather(inputs[rank]), torch.cat(inputs)),
            equal(collectives.all_gather(parts[rank], 0, sizes), uneven),
            equal(collectives.reduce_scatter(inputs[rank], 0, sizes), total.split(sizes)[rank]),
            all(equal(found, inputs[r].split(sizes)[rank]) for r, found in enumerate(got)),
            equal(collectives.broadcast(inputs[rank], world - 1), inputs[world - 1]),
        ]  # fmt: skip
        wrong += [(dtype, place) for place, right in enumerate(checks) if not right]
    return wrong


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.soak), 3])  # of three, one has no part
def test_large_tensors_come_whole(on_kind, world):
    assert on_kind(world, large) == [[]] * world


def several_groups(group):
    """Rows and columns of a grid of four, and all, used in turn."""
    rows, columns = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    collectives = [make_collectives(g) for g in (group.split(rows), group.split(columns), group)]
    mine = torch.tensor([2.0**group.rank])
    sums = [c.all_reduce(mine).item() for _ in range(3) for c in collectives]
    names = [c.all_gather(torch.tensor([group.rank])).tolist() for c in collectives]
    return sums, names


def test_a_worker_is_in_several_groups_at_once(on_kind):
    results = on_kind(4, several_groups)
    for rank, (sums, names) in enumerate(results):
        row, column = sorted({rank, rank ^ 1}), sorted({rank, rank ^ 2})
        assert names == [row, column, [0, 1, 2, 3]]
        assert sums == [sum(2.0**r for r in ranks) for ranks in names] * 3


MISMATCHES = {
    "type": (lambda c, t: c.all_reduce(t), lambda c, t: c.all_reduce(t.bfloat16()), ["float32", "bfloat16"]),
    "size": (lambda c, t: c.all_reduce(t), lambda c, t: c.all_reduce(t[:3]), ["[6]", "[3]"]),
    "shape": (lambda c, t: c.all_reduce(t.view(2, 3)), lambda c, t: c.all_reduce(t.view(3, 2)), ["[2, 3]", "[3, 2]"]),
    "gathered shape": (
        lambda c, t: c.all_gather(t.view(2, 3)),
        lambda c, t: c.all_gather(t.view(2, 3), 1),
        ["all_gather float32 [3] along dim 0", "all_gather float32 [2] along dim 1"],
    ),
    "scattered shape": (
        lambda c, t: c.reduce_scatter(t.view(3, 2)),
        lambda c, t: c.reduce_scatter(t.view(3, 2).t(), 1),
        ["[3, 2] along dim 0", "[2, 3] along dim 1"],
    ),
    "shape of a broadcast": (
        lambda c, t: c.broadcast(t.view(2, 3), 0),
        lambda c, t: c.broadcast(t.view(3, 2), 0),
        ["broadcast float32 [2, 3], root 0", "broadcast float32 [3, 2], root 0"],
    ),
    "operation": (lambda c, t: c.all_reduce(t), lambda c, t: c.all_gather(t), ["all_reduce", "all_gather"]),
    "root": (lambda c, t: c.broadcast(t, 0), lambda c, t: c.broadcast(t, 1), ["root 0", "root 1"]),
    "sizes": (lambda c, t: c.all_gather(t), lambda c, t: c.all_gather(t, 0, [5, 6, 6]), ["all_gather"]),
    "order": (lambda c, t: c.barrier(), lambda c, t: c.all_reduce(t), ["barrier", "all_reduce"]),
    "parts": (lambda c, t: c.all_to_all([t] * 3), lambda c, t: c.all_to_all([t.long()] * 3), ["float32", "int64"]),
}


def mismatched(group):
    """What each rank hears of each mismatch; sums are right before and after."""
    collectives = make_collectives(group)
    heard = {}
    for name, (usual, other, _) in MISMATCHES.items():
        t = torch.full((6,), -7.0)
        try:
            (other if group.rank == 1 else usual)(collectives, t)
            heard[name] = "nothing"
        except OutOfStep as error:
            heard[name] = str(error)
        assert collectives.all_reduce(torch.ones(2)).tolist() == [3.0, 3.0]
    return heard


def test_a_mismatch_raises_on_all_ranks_with_both_signatures_and_the_group_goes_on(on_kind):
    for heard in on_kind(3, mismatched):
        for name, (*_, words) in MISMATCHES.items():
            assert "collective mismatch" in heard[name], name
            assert "nothing was written" in heard[name], name
            assert all(word in heard[name] for word in words), (name, heard[name])


def mismatched_in_a_part(group):
    """The ranks of a part are called what they are called in the run."""
    collectives = make_collectives(group.split([[1, 3, 2, 0]]))
    with pytest.raises(OutOfStep) as raised:
        collectives.all_reduce(torch.ones((3, 2) if group.rank == 3 else (2, 3)))
    group.gather(b"")
    return str(raised.value)


def test_a_mismatch_names_the_ranks_of_the_run_and_what_each_wants(on_kind):
    assert on_kind(4, mismatched_in_a_part) == 4 * [
        "collective mismatch at operation 1, nothing was written: "
        "rank 1, rank 2, rank 0: all_reduce float32 [2, 3]; rank 3: all_reduce float32 [3, 2]"
    ]


def another_message(group):
    collectives = make_collectives(group)
    if group.rank == 0:
        collectives.send(torch.zeros(2, 3), 1)
        collectives.send(torch.ones(2), 1)
        group.gather(b"")  # messages may be lost with a worker that leaves
        return None
    with pytest.raises(OutOfStep) as raised:
        collectives.recv(((3, 2), torch.float32), 0)
    group.gather(b"")
    return str(raised.value)


def test_a_receiver_that_expects_something_else_is_told_both(on_kind):
    assert on_kind(2, another_message)[1] == "rank 0 sends float32 [2, 3], rank 1 expects float32 [3, 2]"


def senders_first(group):
    """All send before anybody receives, more than once; then the other way round from the other end."""
    collectives, peer = make_collectives(group), 1 - group.rank
    for number in range(5):
        collectives.send(torch.full((1000, number), float(group.rank)), peer)
    got = [collectives.recv(((1000, number), torch.float32), peer) for number in range(5)]
    total = collectives.all_reduce(torch.ones(1))
    return [t.sum().item() for t in got], total.item()


def test_messages_of_a_pair_keep_their_order_and_do_not_wait_for_the_receiver(on_kind):
    zeros, ones = ([1000.0 * number * rank for number in range(5)] for rank in (0, 1))
    assert on_kind(2, senders_first) == [(ones, 2.0), (zeros, 2.0)]


def counted(group):
    collectives, rank, world = make_collectives(group), group.rank, group.world
    collectives.all_reduce(torch.zeros(999))
    collectives.all_gather(torch.zeros(rank + 1, 2), 0, [1, 2, 3])
    collectives.reduce_scatter(torch.zeros(2, 6), 1, [1, 2, 3])
    collectives.all_to_all([torch.zeros(10 * rank + to) for to in range(world)])
    collectives.broadcast(torch.zeros(7), 1)
    collectives.send(torch.zeros(4), (rank + 1) % world)
    collectives.recv(torch.zeros(4), (rank - 1) % world)
    collectives.barrier()  # who leaves takes what is still under way along
    totals = group.counters.totals()
    return {place[0]: (total.calls, total.sent_bytes, total.received_bytes) for place, total in totals.items()}


def test_bytes_are_counted_by_the_formulas(on_kind):
    for rank, found in enumerate(on_kind(3, counted)):
        own, others = 4 * (rank + 1) * 2, 4 * (6 - rank - 1) * 2
        sent = 4 * sum(10 * rank + to for to in range(3) if to != rank)
        received = 4 * sum(10 * r + rank for r in range(3) if r != rank)
        expected = {
            "all-reduce": (1, 2 * 2 * 4 * 333, 2 * 2 * 4 * 333),
            "all-gather": (1, 2 * own, others),
            "reduce-scatter": (1, others, 2 * own),
            "all-to-all": (1, sent, received),
            "broadcast": (1, 56, 0) if rank == 1 else (1, 0, 28),
            "send": (1, 16, 0),
            "receive": (1, 0, 16),
        }
        assert {name: found[name] for name in expected} == expected


def alone(group):
    collectives, t = make_collectives(group), torch.zeros(3, 2)
    same = [
        collectives.all_reduce(t),
        collectives.all_gather(t, 1),
        collectives.reduce_scatter(t),
        *collectives.all_to_all([t]),
    ]
    collectives.barrier()
    with pytest.raises(UserError, match="is no other rank of 1"):
        collectives.send(t, 0)
    return all(found is t for found in same)  # fmt: skip


def test_one_worker_pays_nothing(on_kind):
    assert on_kind(1, alone) == [True]


def refused(group):
    collectives, t = make_collectives(group), torch.zeros(3, 2)
    asked = {
        "has no dim 2": lambda: collectives.all_gather(t, 2),
        "not a multiple of the 2 ranks": lambda: collectives.reduce_scatter(t),
        "do not cut dim 0": lambda: collectives.reduce_scatter(t, 0, [1, 1]),
        "are not those of 2 ranks": lambda: collectives.all_gather(t, 0, [4, 4]),
        "one part of one type": lambda: collectives.all_to_all([t]),
        "no rank 2 among 2": lambda: collectives.broadcast(t, 2),
        "no other rank of 2": lambda: collectives.send(t, group.rank),
    }
    for words, ask in asked.items():
        with pytest.raises(UserError, match=words):
            ask()
    return True


def test_what_cannot_be_is_refused_before_anything_is_sent(on_workers):
    assert on_workers(2, refused) == [True, True]


def history(group):
    collectives, t = make_collectives(group), torch.ones(4, 4, requires_grad=True)
    found = [collectives.all_reduce(t), collectives.all_gather(t, 1), collectives.reduce_scatter(t.t(), 1)]
    return [f.requires_grad for f in found]


def test_results_have_no_history(on_kind):
    assert on_kind(2, history) == [[False] * 3] * 2


def in_arenas(group):
    """Tensors that are made inside: read and written where they lie."""
    collectives, rank, world = make_collectives(group), group.rank, group.world
    with group.arenas.inside():
        t = values((world * 200_000,), torch.float32, rank).clone()
        assert group.arenas.place(t) is not None
        results = [collectives.all_reduce(t), collectives.all_gather(t), collectives.reduce_scatter(t)]
        results.append(collectives.broadcast(t, 0))
        results += collectives.all_to_all(t.split(200_000))
    inputs = [values((world * 200_000,), torch.float32, r) for r in range(world)]
    total = in_rank_order(inputs)
    expected = [total, torch.cat(inputs), total.split(200_000)[rank], inputs[0]]
    expected += [i.split(200_000)[rank] for i in inputs]
    right = all(equal(a, b) for a, b in zip(results, expected, strict=True))
    return right, collectives._carrier.in_place


@pytest.mark.skipif(build.ranks() is None or build.allocator() is None, reason="needs the C++ parts")
def test_what_lies_in_the_arenas_is_not_moved_twice(on_workers):
    assert on_workers(3, in_arenas) == [(True, 5)] * 3


def early_leaver(group):
    collectives = make_collectives(group.split([[2, 1, 0]]))
    if group.rank == 1:
        return "left"
    try:
        collectives.all_reduce(torch.ones(100_000))
    except PeerLost as lost:
        return str(lost)
    return "nothing"


@pytest.mark.parametrize("kind", ["C++", "Python"])
def test_a_peer_that_has_gone_ends_the_wait(on_workers, kind):
    """Whoever notices first leaves too: the last one may name that one. Which loss was the cause, the agent says."""
    first, left, last = on_workers(3, in_kind, kind, early_leaver)
    assert left == "left"
    assert "rank 1" in first or "rank 1" in last, (first, last)
    assert "rank" in first
    assert "rank" in last


def stuck(group, how):
    collectives = make_collectives(group.split([[1, 2], [0]]))
    group.report(Phase.forward, step=5, shard=3)
    if group.rank == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    if group.rank == 1:
        if how == "receives":
            collectives.recv(torch.ones(3), 1)
        collectives.all_reduce(torch.ones(100_000))
    group.report(Phase.ended)


@pytest.mark.parametrize("kind", ["C++", "Python"])
@pytest.mark.parametrize("how", ["sums", "receives"])
def test_a_hang_is_told_with_who_waits_for_whom(on_workers, kind, how):
    with pytest.raises(RunFailed) as failed:
        on_workers(3, in_kind, kind, stuck, how, hang_after_s=0.8)
    assert "rank 2" in str(failed.value).split(" hangs at step 5, forward shard 3")[0]
    assert "rank 1 is step 5, waiting for rank 2" in str(failed.value)


@pytest.mark.parametrize("kind", ["C++", "Python"])
def test_a_killed_peer_is_the_one_that_is_named(on_workers, kind):
    begun = time.monotonic()
    with pytest.raises(RunFailed, match=r"rank 2 .* was killed by SIGKILL .* at step 5, forward shard 3"):
        on_workers(3, in_kind, kind, stuck, "killed", hang_after_s=100.0)
    assert time.monotonic() - begun < 50  # the wait did not go on until somebody lost patience


def positions(group):
    """Where a worker says it is after a wait: where it was before."""
    collectives = make_collectives(group)
    group.report(Phase.backward, step=1, shard=2)
    if group.rank == 0:
        time.sleep(0.3)
    collectives.barrier()
    waits = [total.waits for place, total in group.counters.totals().items() if place[0] == "barrier"]
    return str(group.report.position), waits[0][0] > 0.1


@pytest.mark.parametrize("kind", ["C++", "Python"])
def test_after_a_wait_a_worker_is_where_it_was_and_the_wait_is_counted(on_workers, kind):
    assert on_workers(2, in_kind, kind, positions) == [
        ("step 1, backward shard 2", False),
        ("step 1, backward shard 2", True),
    ]


def test_the_three_are_three(on_workers):
    def carrier(group):
        return type(make_collectives(group)._carrier).__name__

    names = [on_workers(2, in_kind, kind, carrier)[0] for kind in KINDS]
    assert names == ["Native" if build.ranks() else "Messages", "Messages", "ProcessGroup"]
