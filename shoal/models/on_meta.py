"""Modules without memory, quickly: what fills tensors with first values is passed over.

Else some of torch's fillers are carried out on the meta device by decompositions in Python, whose import brings the
whole of torch's compiler: over a second, and 70 MB in every process."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class NoFirstValues(TorchFunctionMode):
    """Within it, the functions of ``torch.nn.init`` do nothing. It must be entered after ``torch.device``."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules that are made within the block lie on the meta device."""
    with torch.device("meta"), NoFirstValues():
        yield
