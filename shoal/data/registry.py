"""The sources by name, and the one way in: a recipe's [data] to the samples to train on and those held out."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from shoal.data.preprocess import Preprocessed
from shoal.data.reference import resolve
from shoal.data.source import Source, Splits
from shoal.errors import unknown_name
from shoal.recipe.recipe import DataSpec

SOURCES = {  # name -> the function that opens it: (DataSpec, seed) -> Splits
    "text": "shoal.data.text:open_text",
    "idx": "shoal.data.idx:open_idx",
    "images": "shoal.data.images:open_images",
    "csv": "shoal.data.table:open_table",
    "jsonl": "shoal.data.table:open_table",
    "parquet": "shoal.data.table:open_table",
    "squad": "shoal.data.squad:open_squad",
    "arrays": "shoal.data.arrays:open_arrays",
    "python": "shoal.data.dataset:open_dataset",
}


def open_data(spec: DataSpec, seed: int, given: Any = None) -> Splits:
    """The splits of the source that ``spec`` names; ``seed`` chooses what is held out and keys random augmentation.

    ``given`` stands in for it: Splits, or any map-style training set.
    Raises UserError for an unknown source or option, and for files that are missing or damaged."""
    if given is not None:
        from shoal.data.dataset import DatasetSource

        return given if isinstance(given, Splits) else Splits(DatasetSource(given))
    if spec.source not in SOURCES:
        raise unknown_name("data source", spec.source, SOURCES)
    module, function = SOURCES[spec.source].split(":")
    opener: Callable[[DataSpec, int], Splits] = getattr(import_module(module), function)
    splits = opener(spec, seed)
    name = str(spec.options.get("preprocess", ""))
    if not name:
        return splits
    step = resolve(name, "data.preprocess")

    def wrapped(source: Source | None) -> Source | None:
        return None if source is None else Preprocessed(source, step, name)

    return Splits(Preprocessed(splits.train, step, name), wrapped(splits.validation), wrapped(splits.test))
