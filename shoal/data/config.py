"""What every source's own config shares, and how it is read from the recipe's [data] table."""

from dataclasses import dataclass
from typing import TypeVar

from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec
from shoal.recipe.typed import from_mapping


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    preprocess: str = ""  # "module:function", Batch -> Batch, applied to every batch after it is fetched


C = TypeVar("C", bound=SourceConfig)


def read_config(cls: type[C], spec: DataSpec) -> C:
    """The source's config from the keys of [data] that ``DataSpec`` does not name itself.

    Raises UserError for a value of the wrong type or an unknown key, with the nearest name."""
    return from_mapping(cls, spec.options, f"[data] with source = {spec.source!r}")


def at_least(least: int, **values: int) -> None:
    """Raises UserError naming the first option that is smaller than ``least``."""
    for name, value in values.items():
        if value < least:
            raise UserError(f"data: {name} must be at least {least}, got {value}.")
