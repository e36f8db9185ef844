"""Resolve "module:function", the way a recipe names Python code of the user."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import UserError, unknown_name


def resolve(reference: str, key: str) -> Callable[..., Any]:
    """The callable that "module:function" names; modules of the working directory are found too, as by ``python -m``.

    ``key`` is the recipe key it stood under, for the error. Raises UserError when it is not written so, when the module
    cannot be imported, or when it has no such callable."""
    module_name, colon, name = reference.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"{key} = {reference!r} must be written 'module:function'.")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise UserError(f"{key}: cannot import {module_name!r}: {type(error).__name__}: {_line(error)}") from error
    found = getattr(module, name, None)
    if found is None:
        raise unknown_name("function", name, [n for n in vars(module) if not n.startswith("_")], module_name)
    if not callable(found):
        raise UserError(f"{key} = {reference!r} is a {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"
