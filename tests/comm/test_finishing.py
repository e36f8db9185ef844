"""Finishing a slice: the kernels and torch agree to the bit, wherever the operands lie."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm import finishing
from shoal.comm.exchange import cuts
from shoal.comm.finishing import block_squares, finish_flat, finish_pieces, global_norm, slice_of
from shoal.comm.layout import BLOCK, flat_layout
from shoal.comm.native import build
from shoal.comm.tree import Add, completion

needs_compiler = pytest.mark.skipif(build.kernels() is None, reason=f"no kernels: {build.why_not(['kernels'])}")
SIZES = st.lists(
    st.sampled_from([0, 1, 5, 16, 17, 2047, 2048, 2049, BLOCK, BLOCK + 3, 3 * BLOCK]), min_size=1, max_size=8
)


def operands_of(layout, count, dtype, seed=0):
    """Flat buffers with numbers in their slots and zeros between them."""
    generator = torch.Generator().manual_seed(seed)
    flats = [torch.zeros(layout.elements, dtype=dtype) for _ in range(count)]
    for flat in flats:
        for slot in layout.slots:
            flat[slot.offset : slot.offset + slot.size] = torch.randn(slot.size, dtype=dtype, generator=generator)
    return flats


def by_torch(operands, adds, by):
    """The additions and the division, written out."""
    total = [operand.clone() for operand in operands]
    for add in adds:
        total[add.into] = total[add.into] + total[add.other]
    return total[0] / by


@needs_compiler
@settings(max_examples=15)
@given(
    sizes=SIZES,
    workers=st.integers(1, 4),
    leaves=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    by=st.sampled_from([1.0, 3.0, 640.0]),
)
def test_scattered_slots_get_the_bits_of_flat_torch_operands(sizes, workers, leaves, dtype, by):
    layout = flat_layout(sizes, [3], workers, 2 * BLOCK)
    flats = operands_of(layout, leaves, dtype)
    adds = completion([range(leaf, leaf + 1) for leaf in range(leaves)], [1] * leaves)
    wanted = by_torch(flats, adds, by)
    # every slot of every operand is moved to a memory of its own
    scattered = [[flat[s.offset : s.offset + s.size].clone() for s in layout.slots] for flat in flats]
    addresses = np.array([[slot.data_ptr() for slot in row] for row in scattered], dtype=np.uint64)
    squares = torch.zeros(layout.elements // BLOCK, dtype=torch.float64)
    for bucket in layout.buckets:
        for rank in range(workers):
            owned = bucket.owned(rank)
            for start, stop in cuts(layout, owned.start, owned.stop):
                into = squares[start // BLOCK : stop // BLOCK] if start < layout.state_start else None
                finish_pieces(slice_of(layout, start, stop), addresses, dtype, adds, by, into)
    for slot, found in zip(layout.slots, scattered[0], strict=True):
        assert torch.equal(found, wanted[slot.offset : slot.offset + slot.size])
    ends = layout.state_start // BLOCK
    assert torch.equal(squares[:ends], finishing._block_squares(wanted[: layout.state_start]))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_the_kernels_the_bits_are_the_same(dtype, monkeypatch):
    layout = flat_layout([5 * BLOCK + 77], [], 1, BLOCK)
    adds = [Add(0, 1), Add(2, 3), Add(0, 2)]
    found = []
    for native in ("1", "0"):
        monkeypatch.setenv("SHOAL_NATIVE", native)
        flats = operands_of(layout, 4, dtype)
        squares = torch.zeros(layout.elements // BLOCK, dtype=torch.float64)
        finish_flat(flats, adds, 7.0, squares)
        found.append((flats[0], squares))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_the_squares_of_a_block_are_those_of_exact_arithmetic_within_rounding():
    values = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(3))
    for found, block in zip(block_squares(values).tolist(), values.split(BLOCK), strict=True):
        assert found == pytest.approx(math.fsum(x * x for x in block.tolist()), rel=1e-14)


def test_a_single_changed_element_changes_the_squares_of_its_block_only():
    values = torch.ones(3 * BLOCK)
    before = block_squares(values)
    values[BLOCK + 12345] = 2.0
    assert (block_squares(values) - before).tolist() == [0.0, 3.0, 0.0]


@settings(max_examples=15)
@given(sizes=SIZES, workers=st.integers(1, 5))
def test_the_slices_of_all_workers_hold_every_element_once(sizes, workers):
    layout = flat_layout(sizes, [7], workers, BLOCK)
    seen = [np.zeros(slot.size, dtype=int) for slot in layout.slots]
    for bucket in layout.buckets:
        for rank in range(workers):
            owned = bucket.owned(rank)
            for part in (slice_of(layout, *cut) for cut in cuts(layout, owned.start, owned.stop)):
                for slot, offset, (place, length) in zip(part.slots, part.offsets, part.places, strict=True):
                    seen[slot][offset : offset + length] += 1
                    assert layout.slots[slot].offset + offset == part.start + place
                    assert place // BLOCK == (place + length - 1) // BLOCK
    assert all((counts == 1).all() for counts in seen)


def test_a_norm_of_blocks_that_are_not_finite_is_not_a_number():
    assert global_norm([9.0, 16.0]) == 5.0
    assert math.isnan(global_norm([1.0, math.inf]))
    assert math.isnan(global_norm([math.nan]))
