"""The bookkeeping of cache blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.generation.blocks import BlockPool, OutOfBlocks, block_key


@given(
    st.lists(st.tuples(st.sampled_from(["take", "hold", "release", "publish", "find"]), st.integers(0, 7)), max_size=80)
)
def test_no_block_is_lost_or_used_twice(acts):
    pool = BlockPool(4)
    tables: list[list[int]] = [[] for _ in range(8)]
    for act, number in acts:
        table = tables[number]
        if act == "take":
            if pool.available:
                block = pool.take()
                assert all(block not in other for other in tables), "handed out while somebody holds it"
                table.append(block)
            else:
                with pytest.raises(OutOfBlocks):
                    pool.take()
        elif act == "hold":
            for block in tables[(number + 1) % 8]:
                if block not in table:
                    pool.hold(block)
                    table.append(block)
        elif act == "release" and table:
            pool.release(table.pop())
        elif act == "publish" and table:
            pool.publish(table[-1], block_key(b"", [number]))
        elif act == "find":
            block = pool.find(block_key(b"", [number]))
            if block is not None and block not in table:
                pool.hold(block)
                table.append(block)
        pool.check(tables)


def test_the_check_finds_a_block_that_somebody_forgot_to_release():
    pool = BlockPool(2)
    pool.take()
    with pytest.raises(AssertionError, match="lost"):
        pool.check([])


def test_a_kept_block_is_found_until_its_place_is_needed_the_longest_unused_first():
    pool = BlockPool(2)
    blocks = {key: pool.take() for key in (b"a", b"b")}
    for key, block in blocks.items():
        pool.publish(block, key)
    pool.release(blocks[b"b"])
    pool.release(blocks[b"a"])
    assert pool.find(b"a") == blocks[b"a"]
    assert pool.take() == blocks[b"b"]
    assert pool.find(b"b") is None
    assert pool.find(b"a") == blocks[b"a"]


def test_a_key_says_all_tokens_before_it_and_whose_they_are():
    assert block_key(block_key(b"", [1, 2]), [3]) == block_key(block_key(b"", [1, 2]), [3])
    assert block_key(block_key(b"", [1, 2]), [3]) != block_key(block_key(b"", [2, 1]), [3])
    assert block_key(b"one client", [1]) != block_key(b"another", [1])
