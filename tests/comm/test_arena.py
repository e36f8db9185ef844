"""Arenas: what a worker's backward pass makes lies where the others can read it, and only that."""

import os
import resource

import pytest
import torch

from shoal.comm.arena import Arenas, OwnMemory, arena_files
from shoal.comm.native import build

pytestmark = pytest.mark.skipif(build.allocator() is None, reason=f"no arena: {build.why_not(['allocator'])}")


def _made_inside_and_outside(group):
    """Each worker fills a tensor with its rank + 1; rank 0's and rank 1's are read by the other one."""
    arenas = group.arenas
    with arenas.inside():
        large, small = torch.full((1000, 1000), float(group.rank + 1)), torch.ones(10)
    outside = torch.ones(1000, 1000)
    place = arenas.place(large)
    places = [int(row) for row in group.gather(str(place).encode())]
    other = 1 - group.rank
    read = float(arenas.view(other, places[other], 1_000_000, torch.float32).sum())
    group.gather(b"")  # nobody lets go before all have read
    return place, arenas.place(small), arenas.place(outside), read


def test_a_large_tensor_made_inside_can_be_read_by_the_other_worker(on_workers):
    for rank, (large, small, outside, read) in enumerate(on_workers(2, _made_inside_and_outside)):
        assert large is not None
        assert small is None
        assert outside is None
        assert read == (2 - rank) * 1e6


def _made_again(group):
    """Memory that is let go is handed out again, whole, after any order of letting go."""
    generator = torch.Generator().manual_seed(group.rank)
    ends = []
    for _ in range(20):
        with group.arenas.inside():
            tensors = [torch.empty(int(n)) for n in torch.randint(20_000, 300_000, (12,), generator=generator)]
        ends.append(max(group.arenas.place(t) + t.nbytes for t in tensors))
        for index in torch.randperm(12, generator=generator).tolist():
            tensors[index] = None
        del tensors
    return ends


def test_memory_that_was_let_go_is_used_again(on_workers):
    for ends in on_workers(2, _made_again):
        assert max(ends) <= 12 * 300_000 * 4 + 12 * 4096


def _overlap(group):
    with group.arenas.inside():
        tensors = [torch.full((70_000 + 1000 * i,), float(i)) for i in range(30)]
        for i in range(0, 30, 2):
            tensors[i] = torch.full((40_000 + 500 * i,), float(i))
    return all(bool((t == i).all()) for i, t in enumerate(tensors))


def test_tensors_of_an_arena_never_overlap(on_workers):
    assert on_workers(2, _overlap) == [True, True]


def test_one_worker_or_a_limit_on_address_space_makes_no_arena(monkeypatch):
    assert arena_files(1) == []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 32, 1 << 32))
    assert arena_files(4) == []


def test_without_files_nothing_is_inside():
    arenas = Arenas(0, [])
    with arenas.inside():
        assert arenas.place(torch.ones(100_000)) is None


def test_files_take_no_memory_before_they_are_touched():
    files = arena_files(2)
    try:
        assert [os.fstat(file).st_blocks for file in files] == [0, 0]
    finally:
        for file in files:
            os.close(file)


def test_a_lone_workers_memory_is_read_where_it_lies():
    aligned = torch.ones(64)
    assert OwnMemory().place(aligned) == aligned.data_ptr()
    assert OwnMemory().place(aligned[1:]) is None
