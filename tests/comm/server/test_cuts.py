"""Every element has one server, and servers hold as much as each other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm.layout import ALIGNMENT, BLOCK, flat_layout
from shoal.comm.server.cuts import parts, pieces
from shoal.errors import UserError

SIZES = st.lists(st.one_of(st.integers(0, 50), st.integers(1, 5 * BLOCK)), min_size=1, max_size=12)


@st.composite
def layouts(draw):
    gradients = draw(SIZES)
    state = draw(st.lists(st.integers(0, 3000), max_size=3))
    buckets = draw(st.sampled_from([1, BLOCK, 4 * BLOCK]))
    return gradients, flat_layout(gradients, state, draw(st.integers(1, 4)), buckets)


def units(layout, gradients):
    end = max(slot.offset + -(-slot.size // ALIGNMENT) * ALIGNMENT for slot in layout.slots[: len(gradients)])
    return end // ALIGNMENT


@settings(max_examples=30)  # each looks at every unit of up to two million elements
@given(layouts(), st.integers(1, 5), st.booleans())
def test_every_element_lies_on_one_server_in_one_piece_of_one_bucket(made, servers, whole):
    gradients, layout = made
    most = len(gradients) if whole else units(layout, gradients)
    if units(layout, gradients) < servers or most < servers:
        with pytest.raises(UserError, match=rf"^{servers} parameter servers for a model of "):
            pieces(layout, len(gradients), servers, whole=whole)
        return
    held = pieces(layout, len(gradients), servers, whole=whole)
    assert len(held) == servers
    owner = {}
    for server, own in enumerate(held):
        for piece in own:
            bucket = layout.buckets[piece.bucket]
            assert bucket.start <= piece.start < piece.stop <= bucket.stop
            assert piece.start % ALIGNMENT == piece.stop % ALIGNMENT == 0
            for unit in range(piece.start // ALIGNMENT, piece.stop // ALIGNMENT):
                assert owner.setdefault(unit, server) == server
    for slot in layout.slots:
        for unit in range(slot.offset // ALIGNMENT, -(-(slot.offset + slot.size) // ALIGNMENT)):
            assert unit in owner


@given(layouts(), st.integers(1, 5))
def test_servers_hold_the_same_number_of_bytes_but_for_one_run(made, servers):
    gradients, layout = made
    if units(layout, gradients) < servers:
        return
    held = pieces(layout, len(gradients), servers, state=False)
    sizes = [sum(piece.size for piece in own) for own in held]
    assert max(sizes) - min(sizes) <= ALIGNMENT


@given(layouts(), st.integers(1, 5), st.booleans())
def test_parts_put_together_are_the_parameters_and_whole_ones_are_never_cut(made, servers, whole):
    gradients, layout = made
    if units(layout, gradients) < servers or len(gradients) < servers:
        return
    held = pieces(layout, len(gradients), servers, whole=whole)
    found = [part for own in held for part in parts(layout, own, range(len(gradients)))]
    for slot, size in enumerate(gradients):
        runs = sorted((part.start, part.stop) for part in found if part.slot == slot)
        assert [0, *(stop for _, stop in runs)] == [*(start for start, _ in runs), size]
        if whole and size:
            assert runs == [(0, size)]


def test_all_servers_take_part_in_each_large_bucket():
    layout = flat_layout([40 * BLOCK], [], 2, 8 * BLOCK)
    for own in pieces(layout, 1, 2):
        assert [piece.size for piece in own] == [4 * BLOCK] * 5


def test_one_server_holds_parameters_as_they_are():
    layout = flat_layout([100, 3 * BLOCK, 7], [], 2, BLOCK)
    found = parts(layout, pieces(layout, 3, 1)[0], range(3))
    assert [(part.slot, part.start, part.stop) for part in found] == [(0, 0, 100), (1, 0, 3 * BLOCK), (2, 0, 7)]
