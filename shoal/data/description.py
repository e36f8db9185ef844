"""What is to be known of a run's data to use its model without them: sizes, labels, vocabulary, what numbers become."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from shoal.data.source import Source
from shoal.data.split import Subset


def describe(source: Source) -> dict[str, Any]:
    """Plain JSON: "facts" of the source (lists for tuples), "pixels" as `pixel_table` gives it, and "lacking": names of
    facts that have no such form, which only the data can tell."""
    facts: dict[str, Any] = {}
    lacking: list[str] = []
    for name, value in source.facts.items():
        try:
            facts[name] = json.loads(json.dumps(value, default=_plain))
        except (TypeError, ValueError):
            lacking.append(name)
    return {"facts": facts, "pixels": pixel_table(source), "lacking": lacking}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} has no plain form")


def pixel_table(source: Source) -> list[list[float]] | None:
    """[channels][256]: the number that each pixel value becomes; None for data that is not of pixels."""
    while isinstance(source, Subset):
        source = source.source
    treatment = getattr(source, "pixels", None)
    table = getattr(treatment, "table", None)
    if table is not None:
        plain: list[list[float]] = table.tolist()
        return plain
    stored = getattr(source, "input", None)  # of arrays: 8-bit ones become 0 .. 1
    if isinstance(stored, np.ndarray) and stored.dtype == np.uint8 and stored.ndim == 4:
        return [[value / 255 for value in range(256)]] * int(stored.shape[1])
    return None
