"""The sample ledger: step -> shard -> sample ids, and the proof from a run's event log that each step was done once.

A pure function of (seed, epoch, step): no process has to be asked or told. The order of an epoch is the stable sort of
64-bit keys drawn from the counter-based generator Philox 4x64 (Salmon et al., 2011), whose stream NumPy keeps fixed
over its versions; NumPy's own ``permutation`` comes without that promise.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UserError

Ids = NDArray[np.int64]


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
class Ledger:
    """Which samples belong to which step, shard and micro-batch.

    A full batch gives each shard ``batch / shards`` ids. The tail of an epoch (``samples % batch``) is spread over the
    shards as evenly as whole numbers allow, and inside a shard over its micro-batches; shards and micro-batches left
    without a sample come last. Nothing is padded, repeated or dropped."""

    samples: int
    batch: int
    shards: int
    micro_batches: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError("ledger: the training set has no samples: check data.path and the held-out shares.")
        if min(self.batch, self.shards, self.micro_batches) < 1 or self.batch % (self.shards * self.micro_batches):
            raise UserError(
                f"ledger: batch {self.batch} is not divisible by {self.shards} shards x "
                f"{self.micro_batches} micro-batches."
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.batch)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, index within it) of the global step ``step``, all counted from 0."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return divmod(step, self.steps_per_epoch)

    def counts(self, step: int) -> tuple[int, ...]:
        """How many samples each shard gets at that step."""
        index = self.position(step)[1]
        return tuple(_spread(min(self.batch, self.samples - index * self.batch), self.shards))

    def present(self, step: int) -> tuple[bool, ...]:
        """Which shards have samples at that step: always a prefix, and never none."""
        return tuple(count > 0 for count in self.counts(step))

    def ids(self, step: int) -> Ids:
        """The ids of the whole global batch, in shard order. int64 [batch], or fewer at the end of an epoch."""
        epoch, index = self.position(step)
        return _epoch_order(self.samples, self.seed, epoch)[index * self.batch : (index + 1) * self.batch]

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
        ``branched``, where another run has done the steps up to there."""
        wrong: list[Discrepancy] = []
        done = 0
        for event in events:
            step = int(event.get("step", 0))
            if event.get("event") == "branched":
                done = step
            if event.get("event") == "resumed":
                if step > done:
                    text = f"resumed after step {step}, but {_steps(done + 1, step)} never committed"
                    wrong.append(Discrepancy("skipped", done + 1, text))
                done = step
            if event.get("event") != "committed":
                continue
            if step > done + 1:
                text = f"step {step} was committed, but {_steps(done + 1, step - 1)} never committed"
                wrong.append(Discrepancy("skipped", done + 1, text))
            elif step <= done:
                wrong.append(Discrepancy("doubled", step, f"step {step} was committed again after step {done}"))
            wrong += self._misplaced(step, event)
            done = max(done, step)
        return Account(self, done, tuple(wrong))

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
        epoch, index = self.ledger.position(self.steps)
        return _epoch_order(self.ledger.samples, self.ledger.seed, epoch)[index * self.ledger.batch :]
