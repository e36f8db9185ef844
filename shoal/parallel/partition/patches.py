"""What is replaced while a forward pass is recorded, and put back afterwards."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# functions of torch without a tensor among their arguments, which no recorded value could notice
_FILLED = ("arange", "zeros", "ones", "full", "empty", "eye", "linspace", "logspace", "tensor", "as_tensor")
_DRAWN = ("rand", "randn", "randint", "randperm", "normal")


@contextlib.contextmanager
def patched(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within the block, each owner's attribute of that name is the new one."""
    with contextlib.ExitStack() as undo:
        for owner, name, new in changes:
            if name in vars(owner):
                undo.callback(setattr, owner, name, vars(owner)[name])
            else:
                undo.callback(delattr, owner, name)
            setattr(owner, name, new)
        yield


def homes(model: nn.Module) -> list[Any]:
    """The Python modules in which the classes of the model and of its submodules are written, torch's own left out."""
    names = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return [
        sys.modules[name] for name in sorted(names) if name in sys.modules and name.split(".")[0] not in _NOT_THEIRS
    ]


_NOT_THEIRS = ("builtins", "torch", "typing", "abc", "collections")


def factories(record: Callable[..., Any], live: Callable[[], bool]) -> list[tuple[Any, str, Any]]:
    """Changes after which torch's factories are recorded: they may draw, and their sizes may be recorded values."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def factory(*args: Any, **kwargs: Any) -> Any:
            return record("call_function", original, args, kwargs) if live() else original(*args, **kwargs)

        return factory

    return [(torch, name, wrap(getattr(torch, name))) for name in _FILLED + _DRAWN]
