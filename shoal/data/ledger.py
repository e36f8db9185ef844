"""The sample ledger: step -> shard -> sample ids, and the proof from a run's event log that each step was done once.

A pure function of (seed, epoch, step): no process has to be asked or told. The order of an epoch is the stable sort of
64-bit keys drawn from the counter-based generator Philox 4x64 (Salmon et al., 2011), whose stream NumPy keeps fixed
over its versions; NumPy's own ``permutation`` comes without that promise.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UserError

Ids = NDArray[np.int64]
Changes = tuple[tuple[int, int], ...]  # (steps done before it, samples of each step from then on), in order


def philox(*key: object) -> np.random.Philox:
    """A Philox bit generator keyed by the SHA-256 of the words of ``key``."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))


def permutation(samples: int, *key: object) -> Ids:
    """The ids 0 .. samples - 1 in an order keyed by ``key``; equal on every machine. int64 [samples]."""
    draws = np.asarray(philox(*key).random_raw(samples), dtype=np.uint64)
    return np.argsort(draws, kind="stable").astype(np.int64)


@lru_cache(
    maxsize=4
)  # an epoch is asked for at each of its steps; its first batches are prefetched during the one before
def _epoch_order(samples: int, seed: int, epoch: int) -> Ids:
    order = permutation(samples, "shoal.ledger", seed, epoch)
    order.flags.writeable = False
    return order


def _spread(count: int, parts: int) -> list[int]:
    """``count`` over ``parts``, as even as whole numbers allow, larger parts first: the non-empty ones are a prefix."""
    return [count // parts + (part < count % parts) for part in range(parts)]


@dataclass(frozen=True)
class _Stretch:
    """Steps that all have the same batch."""

    first: int  # steps before it
    batch: int
    epoch: int  # where it begins: the epoch, steps of it that are done, and samples of it that are done
    index: int
    offset: int


@dataclass(frozen=True)
class Ledger:
    """Which samples belong to which step, shard and micro-batch.

    A full batch gives each shard ``batch / shards`` ids. The tail of an epoch (``samples % batch``) is spread over the
    shards as evenly as whole numbers allow, and inside a shard over its micro-batches; shards and micro-batches left
    without a sample come last. Nothing is padded, repeated or dropped.

    ``changes``: steps at which the batch becomes another one. An epoch's order stays: each step takes the next ids."""

    samples: int
    batch: int
    shards: int
    micro_batches: int
    seed: int
    changes: Changes = ()

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError("ledger: the training set has no samples: check data.path and the held-out shares.")
        for batch in (self.batch, *(batch for _, batch in self.changes)):
            if min(batch, self.shards, self.micro_batches) < 1 or batch % (self.shards * self.micro_batches):
                raise UserError(
                    f"ledger: batch {batch} is not divisible by {self.shards} shards x "
                    f"{self.micro_batches} micro-batches."
                )
        firsts = [first for first, _ in self.changes]
        if any(first < 0 for first in firsts) or firsts != sorted(set(firsts)):
            raise UserError(f"ledger: the batch changes after steps {firsts}: they must go up.")

    @property
    def steps_per_epoch(self) -> int:
        """Of the first batch."""
        return -(-self.samples // self.batch)

    def changed(self, done: int, batch: int) -> "Ledger":
        """Once ``done`` steps are done, steps have ``batch`` samples, whatever had been said of them."""
        return replace(self, changes=(*self.before(done).changes, (done, batch)))

    def before(self, done: int) -> "Ledger":
        """Without the changes that come once ``done`` steps are done, or later."""
        return replace(self, changes=tuple(change for change in self.changes if change[0] < done))

    @cached_property
    def _stretches(self) -> tuple[_Stretch, ...]:
        found = [_Stretch(0, self.batch, 0, 0, 0)]
        for first, batch in self.changes:
            found.append(_Stretch(first, batch, *self._from(found[-1], first)))
        return tuple(found)

    def _from(self, stretch: _Stretch, step: int) -> tuple[int, int, int]:
        """(epoch, index, samples of the epoch before it) of a step of the stretch."""
        done = step - stretch.first
        rest = -(-(self.samples - stretch.offset) // stretch.batch)  # steps of the epoch in which it begins
        if done < rest:
            return stretch.epoch, stretch.index + done, stretch.offset + done * stretch.batch
        epochs, index = divmod(done - rest, -(-self.samples // stretch.batch))
        return stretch.epoch + 1 + epochs, index, index * stretch.batch

    def _place(self, step: int) -> tuple[int, int, int, int]:
        """(epoch, index, samples of the epoch before it, samples up to and with it) of a step."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        stretch = self._stretches[bisect_right(self._stretches, step, key=lambda each: each.first) - 1]
        epoch, index, offset = self._from(stretch, step)
        return epoch, index, offset, min(offset + stretch.batch, self.samples)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, index within it) of the global step ``step``, all counted from 0."""
        return self._place(step)[:2]

    def ends_epoch(self, step: int) -> bool:
        """Whether a step takes the last samples of its epoch."""
        return self._place(step)[3] == self.samples

    def seen(self, step: int) -> int:
        """Samples of all epochs that steps before ``step`` take."""
        epoch, _, offset, _ = self._place(step)
        return epoch * self.samples + offset

    def batch_of(self, step: int) -> int:
        """Samples of a step, were it not the last of an epoch."""
        return self._stretches[bisect_right(self._stretches, step, key=lambda each: each.first) - 1].batch

    def steps_in(self, epochs: int) -> int:
        """After how many steps so many epochs are done."""
        ends = [*(stretch.first for stretch in self._stretches[1:]), None]
        for stretch, end in zip(self._stretches, ends, strict=True):
            rest, per = -(-(self.samples - stretch.offset) // stretch.batch), -(-self.samples // stretch.batch)
            whole = epochs - stretch.epoch - 1  # after the one in which it begins
            steps = stretch.first + (rest + whole * per if whole >= 0 else 0)
            if end is None or steps <= end:
                return steps
        raise AssertionError("the last stretch has no end")

    def counts(self, step: int) -> tuple[int, ...]:
        """How many samples each shard gets at that step."""
        _, _, start, stop = self._place(step)
        return tuple(_spread(stop - start, self.shards))

    def present(self, step: int) -> tuple[bool, ...]:
        """Which shards have samples at that step: always a prefix, and never none."""
        return tuple(count > 0 for count in self.counts(step))

    def ids(self, step: int) -> Ids:
        """The ids of the whole global batch, in shard order. int64 [batch], or fewer at the end of an epoch."""
        epoch, _, start, stop = self._place(step)
        return _epoch_order(self.samples, self.seed, epoch)[start:stop]

    def shard(self, step: int, shard: int) -> tuple[Ids, ...]:
        """The ids of the shard's micro-batches, in the order they are summed; () when it has no samples."""
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard {shard} is not in 0 .. {self.shards - 1}")
        counts = self.counts(step)
        start = sum(counts[:shard])
        mine = self.ids(step)[start : start + counts[shard]]
        sizes = _spread(len(mine), self.micro_batches)
        starts = np.cumsum([0, *sizes])
        return tuple(mine[starts[i] : starts[i] + size] for i, size in enumerate(sizes) if size)

    def passes(self, step: int) -> tuple[int, ...]:
        """How many micro-batches each shard has at that step."""
        return tuple(len(self.shard(step, shard)) for shard in range(self.shards))

    def verify(self, events: Iterable[Mapping[str, Any]]) -> "Account":
        """Read a run's events in order and say what was committed, and everything that is wrong with it.

        The log counts steps from 1. Read are ``committed`` (step, epoch, index, samples) and ``resumed`` (step: the
        last that the checkpoint holds; later commits were thrown away with the state they had changed), or
        ``branched``, where another run has done the steps up to there, and ``rebatched`` (step, batch: of the steps
        after it)."""
        wrong: list[Discrepancy] = []
        ledger, done = self, 0
        for event in events:
            step = int(event.get("step", 0))
            if event.get("event") == "branched":
                ledger = replace(self, changes=tuple((first, batch) for first, batch in event.get("batches", ())))
                done = step
            if event.get("event") == "rebatched":
                ledger = ledger.changed(step, event["batch"])
            if event.get("event") == "resumed":
                if step > done:
                    text = f"resumed after step {step}, but {_steps(done + 1, step)} never committed"
                    wrong.append(Discrepancy("skipped", done + 1, text))
                ledger, done = ledger.before(step + 1), step
            if event.get("event") != "committed":
                continue
            if step > done + 1:
                text = f"step {step} was committed, but {_steps(done + 1, step - 1)} never committed"
                wrong.append(Discrepancy("skipped", done + 1, text))
            elif step <= done:
                wrong.append(Discrepancy("doubled", step, f"step {step} was committed again after step {done}"))
            wrong += ledger._misplaced(step, event)
            done = max(done, step)
        return Account(ledger, done, tuple(wrong))

    def _misplaced(self, step: int, event: Mapping[str, Any]) -> list["Discrepancy"]:
        """What the event says about its own step that is not so."""
        if step < 1:
            return [Discrepancy("misplaced", step, f"there is no step {step}: the first is 1")]
        found = []
        said, is_at = (event["epoch"], event["index"]), self.position(step - 1)
        if said != is_at:
            found.append(Discrepancy("misplaced", step, f"step {step} says (epoch, index) {said}, the ledger {is_at}"))
        if event["samples"] != sum(self.counts(step - 1)):
            text = f"step {step} says {event['samples']} samples, the ledger {sum(self.counts(step - 1))}"
            found.append(Discrepancy("miscounted", step, text))
        return found


def _steps(first: int, last: int) -> str:
    return f"step {first} was" if first == last else f"steps {first} to {last} were"


@dataclass(frozen=True)
class Discrepancy:
    """One way in which the event log is not what the ledger says."""

    kind: Literal["skipped", "doubled", "misplaced", "miscounted"]
    step: int  # counted from 1, as in the log
    text: str


@dataclass(frozen=True)
class Account:
    """What the event log proves: steps 1 .. ``steps`` were committed once each, in order, unless ``wrong`` objects."""

    ledger: Ledger
    steps: int
    wrong: tuple[Discrepancy, ...]

    @property
    def epochs(self) -> int:
        """Whole epochs done: each id was trained on that often, and the ids not in ``open`` once more."""
        return self.ledger.position(self.steps)[0]

    @property
    def open(self) -> Ids:
        """The ids that the current epoch has not come to yet, in its order; all of them right after an epoch's end."""
        epoch, _, offset, _ = self.ledger._place(self.steps)
        return _epoch_order(self.ledger.samples, self.ledger.seed, epoch)[offset:]
