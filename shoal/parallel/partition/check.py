"""A cut model is tried out before it is used."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.parallel.partition.arguments import Example, bind, call
from shoal.parallel.partition.chunks import OUTPUT, Chunks
from shoal.parallel.partition.recorded import leaves, substitute
from shoal.parallel.partition.undisturbed import undisturbed


def check(model: nn.Module, chunks: Chunks, example: Example) -> None:
    """Raises UserError when the chunks, one after the other, do not give the model's output for the example to the bit.

    What a forward pass does unseen by a recording (Python's own random numbers, hidden state, numpy) shows here.
    Values are copied between chunks, as they are when they are sent."""
    arguments = bind(model, example)
    if any(isinstance(a, Tensor) and a.is_meta for a in leaves((arguments.args, arguments.kwargs))):
        return
    with torch.no_grad():
        with undisturbed(model):
            wanted = call(model, example)
        with undisturbed(model):
            values: Mapping[str, Any] = {}
            for chunk in chunks.chunks:
                given = {name: values[name] for name in chunk.inputs}
                given |= {name: arguments.arguments[name] for name in chunk.batch_inputs}
                values = substitute(chunk.module(given), lambda a: a.clone() if isinstance(a, Tensor) else a)
    if not _equal(leaves(wanted), leaves(values[OUTPUT])):
        raise UserError(
            f"the chunks of the {type(model).__name__} do not give its output for the example: its forward pass does "
            f"something that no recording sees (numpy, Python's random numbers, state kept outside of buffers). "
            f"Put that part into a submodule of its own, without submodules."
        )


def _equal(wanted: list[Any], found: list[Any]) -> bool:
    return len(wanted) == len(found) and all(map(_same, wanted, found))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and (not isinstance(a, int | float | str | bool) or a == b)
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
