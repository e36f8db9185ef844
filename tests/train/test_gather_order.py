"""In which order parameters come in: every bucket once a sweep, before the blocks that need it, the same for all."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.train.gather_order import Order, order_of

buckets = st.frozensets(st.integers(0, 12), max_size=4)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    return order_of(draw(buckets), draw(st.lists(buckets, min_size=1, max_size=6)))


@given(orders())
def test_a_sweep_asks_for_each_bucket_once_and_for_none_that_is_here(order):
    needed = frozenset().union(*order.needs)
    assert sorted(order.forward) == sorted(needed)
    assert sorted(order.backward) == sorted(needed - order.kept)
    assert not needed & set(order.always)


@given(orders())
def test_a_block_runs_once_its_own_buckets_have_been_asked_for(order):
    for back in (False, True):
        here = order.kept if back else frozenset()
        for block, needs in enumerate(order.needs):
            assert needs <= here | set(order.sweep(back)[: order.position(block, back)])


@given(orders())
def test_blocks_in_running_order_never_ask_for_less_than_the_one_before(order):
    for back in (False, True):
        blocks = range(len(order.needs))[:: -1 if back else 1]
        most = 0
        for block in blocks:
            first = [b for b in order.needs[block] if b in order.sweep(back)[most:]]
            most = max(most, order.position(block, back))
            assert set(first) <= set(order.sweep(back)[:most])
        assert most == len(order.sweep(back))
