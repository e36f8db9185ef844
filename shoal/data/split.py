"""Which samples are trained on and which are held out: pure functions of the seed, and the view that says so."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.data.ledger import Ids, permutation
from shoal.data.source import Batch, Source, Splits
from shoal.errors import UserError


@dataclass(frozen=True)
class Shares:
    """How many of ``total`` samples (or tokens) go where."""

    train: int
    validation: int
    test: int


def shares(total: int, validation: float, test: float) -> Shares:
    """A share above 0 gets at least one sample. Raises UserError when nothing is left to train on."""
    held = [max(1, round(total * share)) if share else 0 for share in (validation, test)]
    if total - sum(held) < 1:  # of a few samples, rounding up may have taken the last one
        held = [max(1, int(total * share)) if share else 0 for share in (validation, test)]
    if total - sum(held) < 1:
        raise UserError(
            f"data: {total} samples are too few to hold out {validation:g} for validation and {test:g} for test: "
            f"lower data.validation or data.test."
        )
    return Shares(total - sum(held), *held)


@dataclass(frozen=True)
class Parts:
    """The ids of each part, ascending; int64."""

    train: Ids
    validation: Ids
    test: Ids

    def splits(self, source: Source, held_out: Source | None = None) -> Splits:
        """Views of ``source``; the parts held out are views of ``held_out``, where one is given: the same samples, but
        without random changes."""
        plain = held_out or source
        held = (Subset(plain, ids) if len(ids) else None for ids in (self.validation, self.test))
        return Splits(Subset(source, self.train), *held)


def random_parts(total: int, validation: float, test: float, seed: int) -> Parts:
    """Samples held out at random, keyed by the seed. Each id is in exactly one part."""
    sizes = shares(total, validation, test)
    order = permutation(total, "shoal.split", seed)
    cuts = np.split(order, [sizes.train, sizes.train + sizes.validation])
    return Parts(*(np.sort(part) for part in cuts))


def tail_ranges(total: int, validation: float, test: float) -> tuple[range, range, range]:
    """(train, validation, test) as contiguous blocks in this order: for a stream, where neighbours are alike."""
    sizes = shares(total, validation, test)
    end = sizes.train + sizes.validation
    return range(sizes.train), range(sizes.train, end), range(end, total)


@dataclass(frozen=True)
class Subset:
    """The samples ``ids`` of another source, numbered from 0 in that order."""

    source: Source
    ids: Ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.source.facts

    @property
    def fingerprint(self) -> str:
        words = self.source.fingerprint.encode() + self.ids.astype("<i8").tobytes()
        return hashlib.sha256(words).hexdigest()

    @property
    def draws(self) -> bool:
        return getattr(self.source, "draws", False)

    def fetch(self, ids: Ids, epoch: int) -> Batch:
        return self.source.fetch(self.ids[ids], epoch)
