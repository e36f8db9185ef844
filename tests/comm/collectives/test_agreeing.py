"""Collectives over a backend that compares nothing: what all ask for is compared in every call, before a byte moves."""

import pytest
import torch

import shoal.comm as comm
from shoal.comm.mesh import OutOfStep


def ring(t, op="sum"):
    return comm.all_reduce(t, op, algorithm="ring")


MISMATCHES = {
    "size": (ring, lambda t: ring(t[:3]), ["all_reduce, float32, 24 bytes, sum", "all_reduce, float32, 12 bytes, sum"]),
    "type": (ring, lambda t: ring(t.double()), ["float32, 24 bytes", "float64, 48 bytes"]),
    "reduction": (ring, lambda t: ring(t, "max"), [", sum, ", ", max, "]),
    "algorithm": (ring, lambda t: comm.all_reduce(t, algorithm="direct"), ["algorithm ring", "algorithm direct"]),
    "operation": (ring, lambda t: comm.all_gather(t, algorithm="ring"), ["all_reduce, ", "all_gather, "]),
    "root": (
        lambda t: comm.broadcast(t, 0, algorithm="direct"),
        lambda t: comm.broadcast(t, 1, algorithm="direct"),
        ["root 0", "root 1"],
    ),
}


def mismatched(group):
    """What each rank hears of each mismatch; sums are right before and after, tensors are left alone."""
    heard = {}
    for name, (usual, other, _) in MISMATCHES.items():
        t = torch.full((6,), -7.0)
        with pytest.raises(OutOfStep) as raised:
            (other if group.rank == 1 else usual)(t)
        heard[name] = str(raised.value)
        assert t.tolist() == [-7.0] * 6
        assert ring(torch.ones(2)).tolist() == [3.0, 3.0]
    return heard


def test_a_mismatch_raises_on_all_ranks_with_both_signatures_and_the_group_goes_on(under_torchrun):
    for heard in under_torchrun(3, mismatched):
        for name, (*_, words) in MISMATCHES.items():
            assert "collective mismatch" in heard[name], name
            first, last = heard[name].split("nothing was written: rank 0, rank 2: ")[1].split("; rank 1: ")
            assert words[0] in first, (name, heard[name])
            assert words[1] in last, (name, heard[name])


def swapped(group):
    """Two calls that all ranks have made in both orders, of as many bytes; then one rank makes the other one."""
    t = torch.full((6,), 1.0)
    for _ in range(3):
        ring(t)
        comm.all_reduce(t, "max", algorithm="ring")
    before = t.clone()
    with pytest.raises(OutOfStep) as raised:
        ring(t, "max" if group.rank == 1 else "sum")
    assert torch.equal(t, before)
    return str(raised.value), comm.all_reduce(torch.ones(2), algorithm="ring").tolist()


def test_a_mismatch_among_calls_that_were_made_in_both_orders_is_told_and_nothing_is_mixed(under_torchrun):
    for heard, after in under_torchrun(3, swapped):
        assert "rank 0, rank 2: all_reduce, float32, 24 bytes, sum" in heard
        assert "rank 1: all_reduce, float32, 24 bytes, max" in heard
        assert after == [3.0, 3.0]


def messages(group):
    """Rank 1 expects another type and another size than rank 0 sends, and then the right ones."""
    if group.rank == 0:
        for sent in (torch.ones(5), torch.ones(4, dtype=torch.int32), torch.full((3,), 7.0)):
            comm.send(sent, 1)
        return []
    heard, room = [], torch.zeros(3)
    for _ in range(2):
        with pytest.raises(OutOfStep) as raised:
            comm.receive(room, 0)
        heard.append(str(raised.value))
        assert room.tolist() == [0.0] * 3
    return [*heard, comm.receive(room, 0).tolist()]


def test_a_message_that_is_not_what_the_receiver_expects_is_told_and_the_next_one_comes(under_torchrun):
    assert under_torchrun(2, messages)[1] == [
        "rank 0 sends float32 [5], rank 1 expects float32 [3]",
        "rank 0 sends int32 [4], rank 1 expects float32 [3]",
        [7.0] * 3,
    ]
