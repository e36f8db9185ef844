"""Slices of the flat buffer, cut at the ends of parameters: every element belongs to one worker of each group."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.layout import BLOCK, flat_layout
from shoal.comm.pages import Pages, give_back_shared, resident_bytes
from shoal.comm.slices import Sharing, pieces_of

CPU = torch.device("cpu")
sizes = st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=9)


@st.composite
def sharings(draw: st.DrawFn) -> Sharing:
    members, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return Sharing(members * groups, members)


@given(sizes, sharings(), st.integers(0, 8 * BLOCK))
def test_the_workers_of_a_group_hold_every_element_once(gradients, sharing, bucket):
    layout = flat_layout(gradients, [70], sharing.world, bucket)
    for group in sharing.groups():
        seen = [torch.zeros(size, dtype=torch.int64) for size in gradients]
        for rank in group:
            for piece in pieces_of(layout, sharing.slices(rank)):
                assert piece.place == layout.slots[piece.slot].offset + piece.start
                seen[piece.slot][piece.start : piece.stop] += 1
        assert all(bool((count == 1).all()) for count in seen)


@given(sharings())
def test_a_worker_holds_what_it_finishes_and_twins_hold_the_same(sharing):
    for rank in range(sharing.world):
        assert rank in sharing.slices(rank)
        assert all(sharing.slices(twin) == sharing.slices(rank) for twin in sharing.slices(rank))


def test_one_worker_holds_whole_parameters():
    layout = flat_layout([3 * BLOCK + 5, 7], [], 1, BLOCK)
    found = pieces_of(layout, Sharing(1, 1).slices(0))
    assert [(piece.slot, piece.start, piece.stop) for piece in found] == [(0, 0, 3 * BLOCK + 5), (1, 0, 7)]


def test_memory_that_is_given_back_is_gone_and_comes_again_as_zeros():
    pages = Pages(1 << 20, torch.float32, CPU)
    assert resident_bytes(pages.tensor) == 0
    pages.tensor.fill_(1.0)
    assert resident_bytes(pages.tensor) == 4 << 20
    pages.release(1 << 18, 1 << 19)
    assert resident_bytes(pages.tensor) == 3 << 20
    assert float(pages.tensor.sum()) == (1 << 20) - (1 << 18)
    pages.tensor[1 << 18] = 2.0
    assert float(pages.tensor[1 << 18]) == 2.0


def test_only_whole_pages_are_given_back():
    pages = Pages(4096, torch.float32, CPU)
    pages.tensor.fill_(1.0)
    pages.release(1, 1023)
    assert float(pages.tensor.sum()) == 4096


def _share(group):
    flat = group.heap.tensor(1 << 18, torch.float32)
    if group.rank == 0:
        flat.fill_(1.0)
    group.gather(b"")
    before = float(flat.sum())
    group.gather(b"")
    if group.rank == 1:
        give_back_shared(flat[1 << 17 :])
    group.gather(b"")
    return before, float(flat.sum()), resident_bytes(flat[: 1 << 17])


def test_a_part_of_a_heap_is_given_back_for_all_workers(on_workers):
    for before, after, kept in on_workers(2, _share):
        assert (before, after, kept) == (1 << 18, 1 << 17, 4 << 17)
