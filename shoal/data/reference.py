"""Python code of the user's own, named in a recipe as "module:function"."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import UserError, unknown_name


def resolve(reference: str, key: str) -> Callable[..., Any]:
    """The function behind "module:function"; modules of the working directory are found too.

    ``key`` is the recipe's key that held it. Raises UserError when there is nothing that can be called."""
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise UserError(f"{key} = {reference!r} must be written 'module:function'.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        text = " ".join(str(error).split())
        raise UserError(f"{key}: cannot import {module_name!r}: {type(error).__name__}: {text}.") from error
    found = getattr(module, name, None)
    if found is None:
        raise unknown_name("function", name, [n for n in vars(module) if n[0] != "_"], f"{key} = {reference!r}")
    if not callable(found):
        raise UserError(f"{key} = {reference!r}: {name} is a {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]
