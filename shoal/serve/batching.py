"""Dynamic batching, as decisions only: what waits goes in, the next batch or the time to look again comes out.

A batch leaves when it is full, or when waiting longer would break the latency target of the one that has waited
longest (Clipper: Crankshaw et al., 2017), as far as the time of a forward pass can be foretold (Clockwork: Gujarati et
al., 2020). Without a target it leaves as soon as the model is free. Each batch is built around the request that must
go next, out of those whose length is nearest to its own: lengths are grouped, and nobody starves. Who would be
answered too late by it stays behind: the others are done the sooner.
"""

import math
from bisect import bisect_left
from collections.abc import Hashable
from dataclasses import dataclass, field

import msgspec

GRAIN = 8  # tokens: lengths are padded up to a multiple, so that few shapes occur
MEMORY = 32  # batches, after which a size that has not come again is forgotten


class Waiting(msgspec.Struct, frozen=True):
    id: int
    rows: int
    length: int  # tokens; 0: has no length
    group: Hashable  # only requests of one group can share a batch: names, dtypes and shapes of their arrays
    arrived: float  # seconds
    priority: int = 0
    deadline: float = math.inf  # an answer is of use until then


class Batch(msgspec.Struct, frozen=True):
    ids: tuple[int, ...]
    rows: int
    length: int  # padded: [rows, length] goes into the model
    tokens: int  # that are not padding; rows where there are no tokens
    late: tuple[int, ...] = ()  # would have been answered too late, and wait no longer: not among ``ids``

    @property
    def padding(self) -> int:
        """Tokens that are computed for nobody."""
        return self.rows * self.length - self.tokens if self.length else 0


@dataclass
class ForwardTime:
    """Foretells the seconds of a forward pass: a line between two sizes that have been seen, in proportion beyond them.

    New times count a quarter, so that a slower machine is noticed after a few batches. A size that has not come again
    for ``MEMORY`` batches is forgotten: who stays away from a size because it was slow once would never know better."""

    _sizes: dict[int, tuple[float, float, int]] = field(default_factory=dict)  # power of two -> work, seconds, when
    _works: list[float] = field(default_factory=list)  # of the sizes, rising
    _seconds: list[float] = field(default_factory=list)  # likewise
    _count: int = 0

    def seen(self, work: int, seconds: float) -> None:
        self._count += 1
        key = work.bit_length()
        before = self._sizes.get(key, (work, seconds, 0))
        mixed = (0.75 * before[0] + 0.25 * work, 0.75 * before[1] + 0.25 * seconds, self._count)
        self._sizes[key] = mixed
        self._sizes = {key: one for key, one in self._sizes.items() if self._count - one[2] < MEMORY}
        rising = sorted(self._sizes.values())
        self._works, self._seconds = [one[0] for one in rising], [one[1] for one in rising]

    def foretell(self, work: int) -> float:
        """0.0 before anything has been seen: then nothing waits."""
        works, seconds = self._works, self._seconds
        if not works:
            return 0.0
        after = bisect_left(works, work)
        if 0 < after < len(works):
            share = (work - works[after - 1]) / (works[after] - works[after - 1])
            return seconds[after - 1] + share * (seconds[after] - seconds[after - 1])
        nearest = min(after, len(works) - 1)
        return seconds[nearest] / max(works[nearest], 1.0) * work


@dataclass
class Batcher:
    most_rows: int  # of a batch
    latency_s: float = 0.0  # target from arrival to answer; 0: leave at once
    most_padding: float = 0.25  # of a batch's tokens, where there is a choice
    time: ForwardTime = field(default_factory=ForwardTime)
    _waiting: dict[int, Waiting] = field(default_factory=dict)  # in order of arrival
    _rows: int = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """Of all that waits."""
        return self._rows

    def add(self, one: Waiting) -> None:
        """Raises ValueError for more rows than a batch takes, and for an id that is there already."""
        if not 1 <= one.rows <= self.most_rows:
            raise ValueError(f"{one.rows} rows do not fit a batch of {self.most_rows}")
        if one.id in self._waiting:
            raise ValueError(f"request {one.id} is waiting already")
        self._waiting[one.id] = one
        self._rows += one.rows

    def drop(self, id: int) -> bool:
        """False when it was not waiting."""
        one = self._waiting.pop(id, None)
        self._rows -= one.rows if one else 0
        return one is not None

    def next_at(self, now: float) -> float | None:
        """When a batch has to leave; None when nothing waits."""
        if not self._waiting:
            return None
        if self.latency_s <= 0 or self._rows >= self.most_rows:
            return now
        oldest = min(one.arrived for one in self._waiting.values())
        longest = max(one.length for one in self._waiting.values())
        return oldest + self.latency_s - self.time.foretell(self._rows * (padded(longest) or 1))

    def take(self, now: float) -> Batch | None:
        """The batch that leaves now, no longer waiting; None when none has to."""
        due = self.next_at(now)
        if due is None or due > now:
            return None
        first = min(self._waiting.values(), key=lambda one: (-one.priority, one.arrived, one.id))
        chosen = [first]
        rows, shortest, longest = first.rows, first.length, first.length
        tokens = first.rows * first.length
        same = [one for one in self._waiting.values() if one.group == first.group and one is not first]
        # The nearest lengths first; among equals who came first.
        same.sort(key=lambda one: (-one.priority, abs(one.length - first.length), one.arrived, one.id))
        for one in same:
            if rows + one.rows > self.most_rows:
                continue
            wide = padded(max(longest, one.length))
            all_rows, all_tokens = rows + one.rows, tokens + one.rows * one.length
            if wide and wide != padded(shortest) and 1 - all_tokens / (all_rows * wide) > self.most_padding:
                continue
            chosen.append(one)
            rows, tokens = all_rows, all_tokens
            shortest, longest = min(shortest, one.length), max(longest, one.length)
            if rows == self.most_rows:
                break
        for one in chosen:
            self.drop(one.id)
        return self._in_time(chosen, now)

    def _in_time(self, chosen: list[Waiting], now: float) -> Batch:
        """Without those that would be late, the most urgent first. The last one goes if it is not late yet: a model
        that was slow once could not show otherwise that it is fast again."""
        going = sorted(chosen, key=lambda one: one.deadline, reverse=True)
        late: list[int] = []
        rows, width = sum(one.rows for one in going), padded(max(one.length for one in going)) or 1
        while going:
            ends = now + (self.time.foretell(rows * width) if len(going) > 1 else 0.0)
            if ends <= going[-1].deadline:
                break
            rows -= going[-1].rows
            late.append(going.pop().id)
        left_out = set(late)
        kept = [one for one in chosen if one.id not in left_out]
        longest = max((one.length for one in kept), default=0)
        tokens = sum(one.rows * (one.length or 1) for one in kept)
        return Batch(tuple(one.id for one in kept), rows, padded(longest), tokens, tuple(late))


def padded(length: int) -> int:
    return -(-length // GRAIN) * GRAIN
