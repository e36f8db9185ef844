"""Collectives over a backend that compares nothing: what ranks ask for is compared once for an order of calls."""

import pytest
import torch

import shoal.comm as comm
from shoal.comm.collectives import agreeing
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


def repeated(group):
    """Comparisons in each of three rounds of the same calls."""
    gather, made, counts = agreeing.all_gather, [], []

    def counted(*arguments, **named):
        made.append(1)
        return gather(*arguments, **named)

    agreeing.all_gather = counted
    for _ in range(3):
        made.clear()
        for size in (5, 7, 5):
            ring(torch.ones(size))
        comm.barrier(algorithm="direct")
        counts.append(len(made))
    return counts


def test_a_loop_pays_for_it_in_its_first_round_alone(under_torchrun):
    assert under_torchrun(2, repeated) == [[4, 1, 0]] * 2  # the second round begins after its end
