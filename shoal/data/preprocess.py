"""A user's own step between a source and the model."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shoal.data.ledger import Ids
from shoal.data.source import Batch, Source


@dataclass(frozen=True)
class Preprocessed:
    """Every batch of ``source``, passed through ``function``, which must be a pure function of the batch.

    ``name`` ("module:function") stands for it in the fingerprint."""

    source: Source
    function: Callable[[Batch], Batch]
    name: str

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """Those of ``source``, with the shape or the number of features of what comes out."""
        facts = dict(self.source.facts)
        shape = (
            tuple(self.fetch(np.zeros(1, np.int64), 0)["input"].shape[1:]) if {"shape", "features"} & set(facts) else ()
        )
        if "shape" in facts:
            facts["shape"] = shape
        if "features" in facts:
            facts["features"] = shape[-1]
        return facts

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint} {self.name}".encode()).hexdigest()

    @property
    def draws(self) -> bool:
        return getattr(self.source, "draws", False)

    def fetch(self, ids: Ids, epoch: int) -> Batch:
        return self.function(self.source.fetch(ids, epoch))
