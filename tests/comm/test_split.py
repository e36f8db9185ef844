"""Parts of a group: their ranks are places in the part, in the order that was given."""

import pytest
import torch
import torch.distributed as dist

from shoal.comm.tensors import make_collectives
from shoal.errors import UserError


def descending(group):
    part = group.split([[3, 1], [0, 2]])
    collectives = make_collectives(part)
    mine = torch.tensor([group.rank])
    whole = collectives.all_gather(mine).tolist()
    first = collectives.broadcast(mine, 0).item()
    collectives.send(mine, 1 - part.rank)
    other = collectives.recv(mine, 1 - part.rank).item()
    collectives.barrier()
    again = part.split([[1, 0]])
    return part.rank, part.names, [int(r) for r in part.gather(str(group.rank).encode())], whole, first, other, [
        int(r) for r in again.gather(str(group.rank).encode())
    ]  # fmt: skip


def test_a_part_keeps_the_order_that_it_was_given_in(on_group):
    assert on_group(4, descending) == [
        (0, (0, 2), [0, 2], [0, 2], 0, 2, [2, 0]),
        (1, (3, 1), [3, 1], [3, 1], 3, 3, [1, 3]),
        (1, (0, 2), [0, 2], [0, 2], 0, 0, [2, 0]),
        (0, (3, 1), [3, 1], [3, 1], 3, 1, [1, 3]),
    ]


def with_a_torch_that_sorts(group):
    def new_group(ranks, timeout):
        raise AssertionError("was asked for a group that it cannot give")

    dist.new_group = new_group
    with pytest.raises(UserError, match=r"keeps no order but the ascending one, and part \(1, 0\) has another: give"):
        group.split([[1, 0]])
    return True


def test_a_torch_that_cannot_keep_the_order_is_not_asked_to(under_torchrun):
    assert under_torchrun(2, with_a_torch_that_sorts) == [True, True]
