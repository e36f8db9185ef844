"""Real processes over gloo: the contract, every algorithm, and the calls that users make. One start for all of it."""

import os
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from collective_cases import PAIRS, copies, equal, expected, operands, programs, results
from transport_contract import CONTRACT

import shoal.comm as comm
from shoal.cluster.topology import Topology
from shoal.comm.collectives import pick
from shoal.comm.collectives.actions import COLLECTIVES
from shoal.comm.collectives.curves import Curve
from shoal.comm.collectives.execute import carry_out
from shoal.comm.collectives.operations import run_program
from shoal.comm.collectives.pick import Call, hosts_of
from shoal.comm.collectives.registry import algorithms, build
from shoal.comm.transports.contract import Message, drive
from shoal.comm.transports.torch_group import TorchGroup
from shoal.errors import RunFailed, UserError


def the_contract(end, lanes):
    return {steps.__name__: drive(steps(lanes)) == CONTRACT[steps](end.rank, end.size) for steps in CONTRACT}


def every_algorithm(end, lanes):
    """A wrong result of each, by name: none is expected."""
    wrong = []
    for collective, name in PAIRS:
        if collective != "barrier":
            for number, program in enumerate(programs(collective, name, end.size)):
                sizes = [(1, 33, 130)[number % 3]] * program.blocks
                given = operands(program, sizes, (torch.int32, torch.bfloat16, torch.float32)[number % 3])
                kept = copies(given)
                into = results(program, sizes, given)
                drive(carry_out(end, program, given[end.rank], into[end.rank], sizes=sizes))
                if not equal([into[end.rank]], [expected(program, sizes, kept)[end.rank]]):
                    wrong.append(program.headline())
    return wrong


def the_calls(end, lanes):
    """Each public call against what it must give, by the name of what is wrong."""
    n, rank = end.size, end.rank
    rows = torch.stack([torch.arange(6 * n, dtype=torch.float32) + 100 * r for r in range(n)])  # [rank, 6 n]
    right = {}
    for name in algorithms("all_reduce"):
        mine = rows[rank].clone()
        right[f"all_reduce {name}"] = comm.all_reduce(mine, algorithm=name) is mine and torch.equal(mine, rows.sum(0))
    average = comm.all_reduce(rows[rank].clone(), "avg", algorithm="ring")
    right["avg"] = torch.equal(average, rows.sum(0) / n)
    right["max"] = torch.equal(comm.all_reduce(rows[rank].clone(), "max", algorithm="ring"), rows[-1])
    strided = torch.zeros(6 * n, 2)[:, 0].copy_(rows[rank])
    comm.all_reduce(strided, algorithm="halving_doubling")
    right["a tensor with gaps"] = torch.equal(strided, rows.sum(0))
    for root in range(n):
        mine = rows[rank].clone()
        comm.reduce(mine, root, algorithm="binomial")
        right[f"reduce to {root}"] = torch.equal(mine, rows.sum(0) if rank == root else rows[rank])
        mine = rows[rank].clone()
        right[f"broadcast from {root}"] = torch.equal(
            comm.broadcast(mine, root, algorithm="ring", segments=3), rows[root]
        )
        gathered = comm.gather(rows[rank], root, algorithm="binomial")
        right[f"gather to {root}"] = gathered is None if rank != root else torch.equal(gathered, rows)
        out = torch.empty(6 * n)
        comm.scatter(out, rows if rank == root else None, root, algorithm="direct")
        right[f"scatter from {root}"] = torch.equal(out, rows[rank])
    blocks = rows.view(n, n, 6)
    right["reduce_scatter"] = torch.equal(comm.reduce_scatter(rows[rank], algorithm="ring"), blocks.sum(0)[rank])
    right["all_gather"] = torch.equal(comm.all_gather(rows[rank], algorithm="two_level"), rows)
    out = torch.empty(n, 6 * n)
    right["all_gather into out"] = comm.all_gather(rows[rank], out=out, algorithm="ring") is out and torch.equal(
        out, rows
    )
    swapped = comm.all_to_all(rows[rank], algorithm="pairwise")
    right["all_to_all"] = torch.equal(swapped.view(n, 6), blocks[:, rank])
    if rank < 2:
        got = torch.empty(3)
        if rank == 0:
            comm.send(torch.tensor([1.0, 2.0, 3.0]), 1)
        else:
            right["send and receive"] = torch.equal(comm.receive(got, 0), torch.tensor([1.0, 2.0, 3.0]))
    with comm.record() as counted:
        comm.all_reduce(torch.ones(16 * n), algorithm="ring")
    tally = counted.totals["all_reduce", "gloo"]
    right["what is counted"] = (tally.calls, tally.sent_bytes, tally.received_bytes) == (1, *[128 * (n - 1)] * 2)
    right["time is counted"] = 0 < tally.exposed_s <= counted.seconds
    for name in algorithms("barrier"):
        comm.barrier(algorithm=name)
    weight = torch.nn.Parameter(torch.ones(3))
    right["a parameter"] = bool((comm.all_reduce(weight, algorithm="ring") == n).all()) and weight.is_leaf
    right["one host"] = len(set(hosts_of(end))) == 1 and len(hosts_of(end)) == n
    two_lanes = build("all_reduce", "ring", n)
    mine = rows[rank].clone()
    run_program(two_lanes, mine, mine, lanes)
    right["two groups as lanes"] = torch.equal(mine, rows.sum(0))
    return [name for name, fine in right.items() if not fine]


def the_bits(end, lanes):
    """Sums whose bits tell the order, by the canonical algorithm and by what takes other ways with the same order."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(1001, generator=generator) * 1000.0**r for r in range(end.size)]
    out = {}
    for name in ("canonical", "binomial", "ring", "direct", "two_shot", "double_tree"):
        mine = tensors[end.rank].clone()
        out[name] = comm.all_reduce(mine, algorithm=name).view(torch.int32)
    return out


def what_auto_picks(end, lanes):
    """Calls without a name: by the cost model on given links, and by measured times of the backend's own collective."""
    n, rank = end.size, end.rank
    rows = torch.stack([torch.arange(6.0 * n) + 100 * r for r in range(n)])
    blocks = rows.view(n, n, 6)
    links = Topology.synthetic(n, hosts=2)
    curves = tuple(Curve(name="gloo", collective=c, sizes=(1, 1 << 30), values=(1e-9, 1e-9)) for c in COLLECTIVES)
    found = {"links": links, "times": SimpleNamespace(topology=links, curves=curves, corrections={})}
    right = {}
    for name, topology in found.items():
        options = {"topology": topology}
        summed = comm.all_reduce(rows[rank].clone(), **options)
        right[f"all_reduce by {name}"] = torch.equal(summed, rows.sum(0))
        right[f"avg by {name}"] = torch.equal(comm.all_reduce(rows[rank].clone(), "avg", **options), rows.sum(0) / n)
        half = comm.all_reduce(rows[rank].to(torch.bfloat16), **options)
        right[f"half by {name}"] = torch.equal(half, rows.to(torch.bfloat16).float().sum(0).to(torch.bfloat16))
        right[f"reduce_scatter by {name}"] = torch.equal(
            comm.reduce_scatter(rows[rank], **options), blocks.sum(0)[rank]
        )
        right[f"all_gather by {name}"] = torch.equal(comm.all_gather(rows[rank], **options), rows)
        right[f"all_to_all by {name}"] = torch.equal(comm.all_to_all(rows[rank], **options).view(n, 6), blocks[:, rank])
        root = n - 1
        mine = rows[rank].clone()
        comm.reduce(mine, root, **options)
        right[f"reduce by {name}"] = torch.equal(mine, rows.sum(0) if rank == root else rows[rank])
        mine = rows[rank].clone()
        right[f"broadcast by {name}"] = torch.equal(comm.broadcast(mine, root, **options), rows[root])
        gathered = comm.gather(rows[rank], root, **options)
        right[f"gather by {name}"] = gathered is None if rank != root else torch.equal(gathered, rows)
        out = torch.empty(6 * n)
        comm.scatter(out, rows if rank == root else None, root, **options)
        right[f"scatter by {name}"] = torch.equal(out, rows[rank])
        comm.barrier(**options)
    call = Call("all_reduce", end, rows[0], rows[0], 24)
    right["the backend's own is taken"] = call.chosen("auto", None, found["times"], "sum", "once") is None
    right["not for averages"] = call.chosen("auto", None, found["times"], "avg", "once") is not None
    call = Call("all_reduce", end, rows[0], rows[0], 1 << 28)
    pinned = call.chosen("multipath", None, Topology.preset("dgx1-v100", range(n)), "sum", "once") if n > 2 else None
    right["what is made of the links"] = n == 2 or pinned.lanes == 2
    if n == 2:  # measuring takes a second or two
        summed = [comm.all_reduce(rows[rank].clone()) for _ in range(2)]
        right["on links that were measured"] = all(torch.equal(total, rows.sum(0)) for total in summed)
        measured = pick.probed(end)
        right["once"] = pick.probed(TorchGroup()) is measured and measured.topology.size == n
    return [name for name, fine in right.items() if not fine]


def what_is_told(end, lanes):
    """The messages of calls that cannot be carried out."""
    topology = Topology(hosts=("a",) * (end.size + 1))
    calls = {
        "name": lambda: comm.all_reduce(torch.ones(3), algorithm="rign"),
        "other collective": lambda: comm.all_gather(torch.ones(3), algorithm="binomial"),
        "divide": lambda: comm.reduce_scatter(torch.ones(end.size + 1), algorithm="ring"),
        "out": lambda: comm.all_gather(torch.ones(3), out=torch.ones(3), algorithm="ring"),
        "scatter": lambda: comm.scatter(torch.ones(3), None if end.rank == 0 else torch.ones(3), 0, algorithm="direct"),
        "topology": lambda: comm.all_reduce(torch.ones(3), algorithm="ring", topology=topology),
        "root": lambda: comm.broadcast(torch.ones(3), end.size, algorithm="ring"),
        "same": lambda: comm.all_to_all(swap := torch.ones(end.size), out=swap, algorithm="direct"),
        "lane": lambda: end.post([Message(1 - end.rank, torch.ones(1), 1)], []) if end.rank < 2 else fail(),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except UserError as error:
            told[name] = str(error)
    return told


def fail():
    raise UserError("it has 1 lanes")


def a_peer_that_does_not_come(end, lanes):
    """Last of all: the group is of no use afterwards."""
    hasty = TorchGroup([dist.new_group()], timeout_s=0.2)
    message = ""
    if end.rank == 0:
        try:
            comm.receive(torch.ones(8), 1, hasty)
        except RunFailed as error:
            message = str(error)
    dist.barrier()
    return message


PARTS = (the_contract, every_algorithm, the_calls, the_bits, what_auto_picks, what_is_told, a_peer_that_does_not_come)


def on_gloo(group, folder):
    """Everything that the tests below look at, from one start of the processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=group.rank, world_size=group.world)
    try:
        end = TorchGroup()
        lanes = TorchGroup([None, dist.new_group()])
        return {part.__name__: part(end, lanes) for part in PARTS}
    finally:
        dist.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[pytest.param(2, marks=pytest.mark.soak), pytest.param(3, marks=pytest.mark.slow), 4],
    ids="{} ranks".format,
)
def seen(request, agent):
    import cloudpickle

    cloudpickle.register_pickle_by_value(request.module)
    with tempfile.TemporaryDirectory() as folder:
        return agent.run(on_gloo, (os.path.abspath(folder),), workers=request.param)


def test_gloo_keeps_the_contract(seen):
    assert all(value for rank in seen for value in rank["the_contract"].values())
    assert set(seen[0]["the_contract"]) == {steps.__name__ for steps in CONTRACT}


def test_every_algorithm_gives_exact_sums_over_gloo(seen):
    assert [rank["every_algorithm"] for rank in seen] == [[]] * len(seen)


def test_every_call_does_what_it_says(seen):
    assert [rank["the_calls"] for rank in seen] == [[]] * len(seen)


def test_a_call_without_a_name_picks_an_algorithm_or_the_backends_own(seen):
    assert [rank["what_auto_picks"] for rank in seen] == [[]] * len(seen)


def test_bits_do_not_depend_on_what_carries_the_messages(seen):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(1001, generator=generator) * 1000.0**r for r in range(len(seen))]
    for name in seen[0]["the_bits"]:
        program, mine = build("all_reduce", name, len(seen)), copies(tensors)
        comm_loopback(program, mine)
        for rank in seen:
            assert torch.equal(rank["the_bits"][name], mine[0].view(torch.int32)), name
    assert torch.equal(seen[0]["the_bits"]["canonical"], seen[0]["the_bits"]["binomial"])


def comm_loopback(program, tensors):
    from shoal.comm.transports.loopback import Loopback

    Loopback(program.ranks).run(lambda end: carry_out(end, program, tensors[end.rank], tensors[end.rank]))


def test_mistakes_are_told_in_one_line(seen):
    n = len(seen)
    said = {
        "name": "unknown algorithm 'rign' in all_reduce: did you mean 'ring'?",
        "other collective": f"unknown algorithm 'binomial' in all_gather (of {n} ranks)",
        "divide": f"dim 0 of [{n + 1}] of float32 must be a multiple of the {n} ranks",
        "out": f"all_gather: out must be [{n}, 3] of float32, got [3] of float32",
        "scatter": "scatter: rank 0 alone gives a tensor to scatter; this is rank",
        "topology": f"the topology has {n + 1} ranks, but the group has {n}",
        "root": f"root and target must be ranks from 0 to {n - 1}, got {n} and 0",
        "same": "all_to_all: out must not be the tensor that is sent",
        "lane": "it has 1 lanes",
    }
    for rank in seen:
        assert set(rank["what_is_told"]) == set(said)
        for name, part in said.items():
            assert part in rank["what_is_told"][name]
            assert "\n" not in rank["what_is_told"][name]


def test_a_peer_that_does_not_come_is_named(seen):
    assert "rank 0 receives from rank 1 (32 bytes, lane 0): " in seen[0]["a_peer_that_does_not_come"]
    assert "\n" not in seen[0]["a_peer_that_does_not_come"]


def test_without_a_process_group_one_is_told_so():
    with pytest.raises(UserError, match=r"torch\.distributed is not initialised: call init_process_group first"):
        comm.all_reduce(torch.ones(3))
