"""Named dimensions: every parameter of a built-in model says what each of its dims is."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

from torch import nn

Dimensions = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Grain:
    """What a named dimension consists of: a worker keeps whole units of each part."""

    parts: int = 1  # equal runs one after the other: queries, keys and values
    unit: int = 1  # elements that belong together
    called: str = ""  # what a unit is: "heads"
    follows: str = ""  # another dimension, with whose units these belong: both are split alike


@runtime_checkable
class Named(Protocol):
    def dimensions(self) -> Dimensions:
        """Parameter name -> the names of its dims, in order; no name comes twice in one parameter."""


@runtime_checkable
class Grained(Protocol):
    def grains(self) -> Mapping[str, Grain]:
        """Named dimension -> its grain, for those that cannot be cut just anywhere."""


def name_dimensions(model: nn.Module, patterns: Mapping[str, tuple[str, ...]]) -> Dimensions:
    """The names of the first pattern (fnmatch) that fits each parameter's name and its number of dims.

    Raises LookupError for a parameter that no pattern fits: a model must name all of its own."""
    named: Dimensions = {}
    for name, parameter in model.named_parameters():
        fits = [dims for p, dims in patterns.items() if fnmatchcase(name, p) and len(dims) == parameter.dim()]
        if not fits:
            raise LookupError(f"{type(model).__name__} does not name the dims of {name} {tuple(parameter.shape)}")
        named[name] = fits[0]
    return named
