"""Recipes that come with the package, each a TOML file of this folder."""

import tomllib
from importlib.resources import files
from typing import Any

from shoal.errors import unknown_name


def names() -> list[str]:
    return sorted(entry.name.removesuffix(".toml") for entry in files(__name__).iterdir() if entry.name[-5:] == ".toml")


def load(name: str) -> dict[str, Any]:
    """The preset's values as nested tables. Raises UserError with the nearest name when there is none."""
    if name not in names():
        raise unknown_name("preset", name, names())
    return tomllib.loads(files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8"))
