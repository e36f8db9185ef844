"""In which order the buckets of parameters are gathered and let go in a pass over a model's blocks: a plain value.

A pass gathers every bucket that a block needs once on the way forward and once on the way back, always in this order:
workers that run other blocks, or no pass at all, then still take part in the same gathers. What the last block needs
stays here in between. Buckets of what lies in no block (the ends of a model) stay for the whole step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Order:
    """``needs[i]``: the buckets of the i-th block, in the order in which blocks run, without those that always stay."""

    always: tuple[int, ...]
    needs: tuple[frozenset[int], ...]
    forward: tuple[int, ...] = field(init=False)
    backward: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", _first_seen(self.needs))
        kept = self.kept
        back = tuple(bucket for bucket in _first_seen(self.needs[::-1]) if bucket not in kept)
        object.__setattr__(self, "backward", back)

    @property
    def kept(self) -> frozenset[int]:
        """What stays between forward and backward."""
        return self.needs[-1] if self.needs else frozenset()

    def sweep(self, back: bool) -> tuple[int, ...]:
        return self.backward if back else self.forward

    def position(self, block: int, back: bool) -> int:
        """How many buckets of the sweep must have been asked for before this block can run."""
        sweep = self.sweep(back)
        return max((sweep.index(bucket) + 1 for bucket in self.needs[block] if bucket in sweep), default=0)

    def after(self, block: int, back: bool) -> int | None:
        """The block that runs after this one."""
        following = block - 1 if back else block + 1
        return following if 0 <= following < len(self.needs) else None


def order_of(ends: Iterable[int], blocks: Sequence[Iterable[int]]) -> Order:
    """``ends``: buckets of parameters that lie in no block; ``blocks``: those of each block, in running order."""
    always = frozenset(ends)
    return Order(tuple(sorted(always)), tuple(frozenset(needs) - always for needs in blocks))


def _first_seen(needs: Sequence[frozenset[int]]) -> tuple[int, ...]:
    """Each bucket once, where the first block needs it. The flat buffer is laid out from the last layer to the first:
    of one block's buckets the later ones are the earlier layers."""
    return tuple(dict.fromkeys(bucket for own in needs for bucket in sorted(own, reverse=True)))
