"""Where gradients lie in the flat buffer: nothing overlaps, buckets tile it, and workers change the cuts only."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.layout import ALIGNMENT, BLOCK, flat_layout

sizes = st.lists(st.integers(0, 3 * BLOCK), max_size=12)
shapes = st.tuples(sizes.filter(bool), sizes, st.integers(1, 9), st.integers(0, 8 * BLOCK))


@given(shapes)
def test_slots_are_aligned_and_do_not_overlap(drawn):
    gradients, state, workers, bucket = drawn
    layout = flat_layout(gradients, state, workers, bucket)
    assert [slot.size for slot in layout.slots] == gradients + state
    end = 0
    for slot in layout.slots:
        assert slot.offset % ALIGNMENT == 0
        assert slot.offset >= end
        end = slot.offset + slot.size
    assert end <= layout.elements


@given(shapes)
def test_gradients_and_buffers_share_no_block(drawn):
    gradients, state, workers, bucket = drawn
    layout = flat_layout(gradients, state, workers, bucket)
    assert layout.state_start % BLOCK == 0
    for slot in layout.slots[: len(gradients)]:
        assert slot.offset + slot.size <= layout.state_start
    for slot in layout.slots[len(gradients) :]:
        assert slot.offset >= layout.state_start


@given(shapes)
def test_buckets_tile_the_buffer_and_every_worker_has_an_equal_slice_of_whole_blocks(drawn):
    gradients, state, workers, bucket = drawn
    layout = flat_layout(gradients, state, workers, bucket)
    end = 0
    for piece in layout.buckets:
        assert piece.start == end
        assert piece.slice % BLOCK == 0
        assert piece.slice > 0
        owned = [piece.owned(rank) for rank in range(workers)]
        assert [e for o in owned for e in (o.start, o.stop)][1:-1:2] == [o.start for o in owned][1:]
        assert (owned[0].start, owned[-1].stop) == (piece.start, piece.stop)
        end = piece.stop
    assert end == layout.elements
    assert layout.elements - sum(s.size for s in layout.slots) < BLOCK * (workers + 2) + ALIGNMENT * len(layout.slots)


@given(shapes)
def test_a_slot_knows_every_bucket_that_holds_a_part_of_it(drawn):
    gradients, state, workers, bucket = drawn
    layout = flat_layout(gradients, state, workers, bucket)
    for index, slot in enumerate(layout.slots):
        touched = {
            i
            for i, piece in enumerate(layout.buckets)
            if max(piece.start, slot.offset) < min(piece.stop, slot.offset + slot.size)
        }
        assert touched <= set(layout.buckets_of(index))
        assert slot.size == 0 or touched == set(layout.buckets_of(index))


@given(shapes, st.integers(1, 9), st.integers(0, 8 * BLOCK))
def test_slots_and_blocks_depend_on_the_model_alone(drawn, workers, bucket):
    gradients, state, *_ = drawn
    one, other = flat_layout(gradients, state, *drawn[2:]), flat_layout(gradients, state, workers, bucket)
    assert one.slots == other.slots
    assert one.state_start == other.state_start
    used = max(slot.offset + slot.size for slot in one.slots)
    assert {len(range(0, used, BLOCK))} == {len(range(0, min(used, x.elements), BLOCK)) for x in (one, other)}
