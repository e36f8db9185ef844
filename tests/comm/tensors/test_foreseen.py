"""Collectives over torch.distributed compare what all ask for in the operation that moves the bytes, where it can be
foreseen; where it was not, or was another one, nothing differs but the time."""

import random

import pytest
import torch
import torch.distributed as dist

from shoal.comm.mesh import OutOfStep
from shoal.comm.tensors import make_collectives, process_group


class Counted:
    """Counts the operations of torch.distributed that are started while it is open."""

    NAMES = ("all_to_all_single", "broadcast")

    def __enter__(self):
        self.calls = 0
        self._kept = {name: getattr(dist, name) for name in self.NAMES}
        self._gather = process_group.all_gather
        for name, call in self._kept.items():
            setattr(dist, name, self._counting(call))
        process_group.all_gather = self._counting(self._gather)
        return self

    def _counting(self, call):
        def counted(*arguments, **named):
            self.calls += 1
            return call(*arguments, **named)

        return counted

    def __exit__(self, *error):
        for name, call in self._kept.items():
            setattr(dist, name, call)
        process_group.all_gather = self._gather


def repeated(group):
    """Operations of torch.distributed that each collective takes, the first time and later."""
    c, rank = make_collectives(group), group.rank
    asked = {
        "all_reduce": lambda: c.all_reduce(torch.full((500,), rank + 1.0)),
        "all_gather": lambda: c.all_gather(torch.full((rank + 1, 2), 1.0), 0, [1, 2, 3]),
        "reduce_scatter": lambda: c.reduce_scatter(torch.ones(9000, 2)),
        "broadcast": lambda: c.broadcast(torch.full((7,), float(rank)), 2),
        "barrier": c.barrier,
        "large all_reduce": lambda: c.all_reduce(torch.ones(300_000)),
        "large all_gather": lambda: c.all_gather(torch.ones(300_000)),
        "large broadcast": lambda: c.broadcast(torch.ones(300_000), 1),
    }
    taken = {name: [] for name in asked}
    for _ in range(3):
        for name, ask in asked.items():
            with Counted() as operations:
                ask()
            taken[name].append(operations.calls)
    return taken


def test_what_has_come_after_the_same_before_takes_one_operation(under_torchrun):
    assert (
        under_torchrun(3, repeated)
        == [
            {
                "all_reduce": [2, 2, 1],  # the second time it comes after another one than the first time
                "all_gather": [2, 1, 1],
                "reduce_scatter": [2, 1, 1],
                "broadcast": [2, 1, 1],
                "barrier": [1, 1, 1],
                "large all_reduce": [3, 3, 3],  # words, parts, sums
                "large all_gather": [2, 2, 2],
                "large broadcast": [2, 2, 2],
            }
        ]
        * 3
    )


def swapped(group, habits):
    """A habit on all ranks, then one rank does what would come later; what each hears, and sums before and after."""
    c, rank = make_collectives(group), group.rank
    a, b = torch.full((6,), rank + 1.0), torch.full((habits, 2), rank + 2.0)
    heard, sums = [], []
    for _ in range(4):
        for _ in range(3):
            sums += [c.all_reduce(a)[0].item(), c.all_gather(b).sum().item()]
        try:
            c.all_gather(b) if rank == 1 else c.all_reduce(a)
        except OutOfStep as error:
            heard.append(str(error))
    return heard, sums


@pytest.mark.parametrize("rows", [3, 2000])  # as many bytes as the other, and many more
def test_a_mismatch_among_habits_is_told_on_all_ranks_and_the_group_goes_on(under_torchrun, rows):
    for heard, sums in under_torchrun(3, swapped, rows):
        assert sums == [6.0, 2 * rows * 9.0] * 12
        assert heard == [
            f"collective mismatch at operation {number}, nothing was written: rank 0, rank 2: all_reduce float32 [6]; "
            f"rank 1: all_gather float32 [2] along dim 0, sizes {[rows] * 3}"
            for number in (7, 14, 21, 28)
        ]


def changing(group, rounds, remembered):
    """A random order of a few collectives, with tensors of all sizes; those that are not what one process computes."""
    process_group.REMEMBERED = remembered
    c, rank, world = make_collectives(group), group.rank, group.world
    dice = random.Random(4)
    wrong = []
    for number in range(rounds):
        size = dice.choice([0, 1, 5, 700, 40_000])
        dtype = dice.choice([torch.float32, torch.uint8, torch.complex128])
        inputs = [torch.arange(size).add(r + number).remainder(50).to(dtype) for r in range(world)]
        total = torch.stack(inputs).sum(0).to(dtype)
        parts = [[torch.full((dice.randrange(4) * size,), r + 3 * to).to(dtype) for to in range(world)]
                 for r in range(world)]  # fmt: skip
        root = dice.randrange(world)
        right = {
            "all_reduce": lambda i=inputs, t=total: torch.equal(c.all_reduce(i[rank]), t),
            "all_gather": lambda i=inputs: torch.equal(c.all_gather(i[rank]), torch.cat(i)),
            "reduce_scatter": lambda i=inputs, t=total: torch.equal(
                c.reduce_scatter(i[rank], 0, [len(t), 0, 0]), t if rank == 0 else t[:0]
            ),
            "all_to_all": lambda p=parts: all(
                torch.equal(found, p[r][rank]) for r, found in enumerate(c.all_to_all(p[rank]))
            ),
            "broadcast": lambda i=inputs, root=root: torch.equal(c.broadcast(i[rank], root), i[root]),
        }
        name = dice.choice(list(right))
        if not right[name]():
            wrong.append((number, name, size, dtype))
    return wrong


@pytest.mark.parametrize("remembered", [4096, 5])
def test_an_order_that_changes_all_the_time_gives_what_one_process_computes(under_torchrun, remembered):
    assert under_torchrun(3, changing, 250, remembered) == [[]] * 3


def parted(group):
    """Sums in parts of unequal sizes, in the whole, and in parts of other ones."""
    parts = [make_collectives(group.split(rows)) for rows in ([[0, 1], [2]], [[2, 0], [1]])]
    whole = make_collectives(group)
    ones = torch.full((3,), group.rank + 1.0)
    return [collectives.all_reduce(ones)[0].item() for collectives in (*parts, whole)]


def test_parts_may_be_uneven_and_have_one_worker(under_torchrun, on_group):
    wanted = [[3.0, 4.0, 6.0], [3.0, 2.0, 6.0], [3.0, 4.0, 6.0]]
    assert under_torchrun(3, parted) == wanted
    assert on_group(3, parted) == wanted
