"""Who holds which blocks of the cache of keys and values, and which hold what a later request may want again.

A block is free (nothing in it), held by one or more sequences, or kept: held by nobody, but full and known by its key,
until its place is needed. Full blocks are never written again, so that sharing one copies nothing. Paging and sharing
follow Kwon et al., 2023 (vLLM), keys that hash a whole prefix follow their automatic prefix caching. Pure bookkeeping.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class OutOfBlocks(Exception):
    """Every block is held."""


def block_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Names a full block by all tokens up to its end: ``before`` is the key of the block before it, or the salt that
    keeps the prefixes of one client from another's. 128 bits: two prefixes do not meet in one by chance."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._keys: dict[int, bytes] = {}  # of full blocks, held or kept
        self._blocks: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    @property
    def available(self) -> int:
        """How many `take` can hand out."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        return self.count - self.available

    @property
    def kept(self) -> int:
        return len(self._kept)

    def take(self) -> int:
        """A block to write into, held once. The longest unused kept block is given up when none is free.

        Raises OutOfBlocks."""
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            del self._blocks[self._keys.pop(block)]
        else:
            raise OutOfBlocks
        self._holders[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        return self._blocks.get(key)

    def hold(self, block: int) -> None:
        """One more holder of a block that is held or kept."""
        if not self._holders[block]:
            del self._kept[block]
        self._holders[block] += 1

    def release(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._keys:
            self._kept[block] = None
        else:
            self._free.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """The held block is full now, and known by this key. Of two of the same content the first is known."""
        if key not in self._blocks and block not in self._keys:
            self._keys[block] = key
            self._blocks[key] = block

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Raises AssertionError unless the bookkeeping agrees with what all sequences hold. For tests."""
        holders = [0] * self.count
        for table in tables:
            assert len(set(table)) == len(table), "a sequence holds a block twice"
            for block in table:
                holders[block] += 1
        assert holders == self._holders, "a block is lost, or held by nobody who knows"
        unheld = {block for block, number in enumerate(holders) if not number}
        assert sorted([*self._free, *self._kept]) == sorted(unheld), "a block is neither held, kept nor free, or two"
        assert self._keys == {block: key for key, block in self._blocks.items()}
        assert set(self._kept) <= set(self._keys)
