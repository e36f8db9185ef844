"""The arguments of a model, by name."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from shoal.errors import UserError
from shoal.parallel.partition.recorded import UNKNOWN

Example = tuple[Any, ...] | Mapping[str, Any] | None


def bind(model: nn.Module, args: Example, kwargs: Mapping[str, Any] | None = None) -> inspect.BoundArguments:
    """The arguments of ``model(*args, **kwargs)`` with defaults; ``.arguments`` holds the batch inputs of chunks.

    A mapping in place of ``args`` holds named ones. None: arguments without a default are unknown.
    Raises UserError when they do not fit the signature of ``forward``."""
    signature = inspect.signature(model.forward)
    if args is None:
        open_ones = (p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        args = {p.name: UNKNOWN for p in open_ones if p.default is p.empty}
    positional, named = ((), args) if isinstance(args, Mapping) else (args, {})
    try:
        bound = signature.bind(*positional, **{**named, **(kwargs or {})})
    except TypeError as error:
        raise UserError(f"these are not arguments of {type(model).__name__}.forward: {error}.") from None
    bound.apply_defaults()
    return bound


def call(model: nn.Module, example: Example) -> Any:
    """What the model returns for these positional or named arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*(example or ()))
