"""Functions that a recipe names as "module:function"."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import UserError, unknown_name


def load_function(name: str, what: str) -> Callable[..., Any]:
    """The function behind "module:function"; modules in the working directory are found too.

    Raises UserError when ``name`` (given as ``what``, for the message) is not one that can be called."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{what} = {name!r} must be written 'module:function'.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{what} = {name!r}: cannot import {module_name!r}: {error}.") from None
    function = getattr(module, function_name, None)
    if function is None:
        raise unknown_name("function", function_name, [n for n in vars(module) if n[0] != "_"], f"{what} = {name!r}")
    if not callable(function):
        raise UserError(f"{what} = {name!r}: {function_name} is not a function.")
    return function  # type: ignore[no-any-return]
