"""What every source of samples is: a numbered set that can hand over any of its samples as one batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Batch = Mapping[str, "Tensor"]  # every tensor's dim 0 is the sample


class Source(Protocol):
    """Map-style samples with ids 0 .. len - 1. Thread-safe: several loaders fetch at once."""

    def __len__(self) -> int: ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a model must know to fit: "vocab", "classes", "shape" (of one sample), "features", "labels", ..."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 that names the samples, whatever path they lie under."""

    def fetch(self, ids: np.ndarray, epoch: int) -> Batch:
        """The samples ``ids`` (int64 [n]) as one batch, in that order.

        A pure function of (ids, epoch): random augmentation is keyed by the sample's id and the epoch."""


@dataclass(frozen=True)
class Splits:
    train: Source
    validation: Source | None = None
    test: Source | None = None
