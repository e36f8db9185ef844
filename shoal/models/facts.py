"""Sizes that a model takes from its data, and the contradictions between the two."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from shoal.errors import UserError

C = TypeVar("C")


def fill(config: C, facts: Mapping[str, Any], *, equal: tuple[str, ...] = (), at_least: tuple[str, ...] = ()) -> C:
    """The config with every named field that is still 0 or () taken from the facts of the same name.

    A value that was given must equal the fact (``equal``) or be no smaller (``at_least``: a larger vocabulary only has
    rows that are never used). Raises UserError for a contradiction, and for a size that neither side knows."""
    taken: dict[str, Any] = {}
    for name in (*equal, *at_least):
        given = getattr(config, name)
        fact = facts.get(name)
        if isinstance(fact, list):
            fact = tuple(fact)
        if not given and not fact:
            raise UserError(f"the model needs {name!r} and the data does not tell it: set model.{name} in the recipe.")
        if not given:
            taken[name] = fact
        elif fact and name in equal and given != fact:
            raise UserError(f"model.{name} = {given} but the data has {fact}: leave model.{name} out of the recipe.")
        elif fact and name in at_least and given < fact:
            raise UserError(
                f"model.{name} = {given} is less than the {fact} of the data: "
                f"leave model.{name} out, or raise it to at least {fact}."
            )
    return dataclasses.replace(config, **taken)  # type: ignore[type-var]


def at_least_one(config: object, *names: str) -> None:
    """Raises UserError when one of these whole numbers of the config is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"model.{name} must be at least 1, got {getattr(config, name)}.")


def probability(config: object, *names: str) -> None:
    """Raises UserError when one of these numbers of the config is not at least 0 and less than 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"model.{name} must be at least 0 and less than 1, got {getattr(config, name)}.")
