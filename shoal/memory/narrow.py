"""A model whose matrices are kept in bfloat16, while the rest of it computes as before.

Each trained float32 parameter of two dims and more becomes bfloat16 in place: half the memory, the same object, name
and hooks. Its gradient stays float32. Biases and norms are small, and stay what they are.

A forward pass finds float32 in their places, made when a block begins and let go with it, except where autocast takes
bfloat16 as it is. So embeddings and residual sums keep their digits, and nothing in the model needs to know.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shoal.memory.blocks import find_blocks
from shoal.memory.rounding import split

Rounding = Literal["stochastic", "compensated"]
REST = "weight.rest"  # the key in an optimiser's state of the 16 bits that a compensated parameter lacks
_UNDER_AUTOCAST = (nn.Linear, nn.modules.conv._ConvNd)  # take a bfloat16 weight as it is


class _Widened(torch.autograd.Function):
    """float32 values of a bfloat16 parameter; their gradient is the parameter's, and stays float32."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


@torch.no_grad()
def narrow(module: nn.Module, rounding: Rounding, blocks: tuple[str, ...] = ()) -> dict[nn.Parameter, Tensor | None]:
    """Keep the module's matrices in bfloat16, in place; each with the 16 bits that rounding takes off, if compensated.

    ``blocks``: modules that bring in their own weights, as ``find_blocks`` takes them; the rest of the model is one."""
    kinds = (torch.float32, torch.bfloat16)
    parameters = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2 and p.dtype in kinds]
    _widen_in_forward(module, set(parameters), blocks)
    rests: dict[nn.Parameter, Tensor | None] = {}
    for parameter in parameters:
        rest = None
        if rounding == "compensated" and parameter.dtype == torch.bfloat16:
            upper, rest = parameter.detach(), torch.zeros_like(parameter, dtype=torch.int16)
        elif rounding == "compensated":
            upper, rest = split(parameter.detach().contiguous().view(-1))
            upper, rest = upper.view(parameter.shape), rest.view(parameter.shape)
        else:
            upper = parameter.detach().bfloat16()
        parameter.data = upper
        parameter.grad_dtype = torch.float32
        rests[parameter] = rest
    return rests


def _widen_in_forward(module: nn.Module, parameters: Collection[nn.Parameter], patterns: tuple[str, ...]) -> None:
    inner = find_blocks(module, patterns)
    owned = {id(m): block for block in inner.values() for m in block.modules()}
    units: dict[int, list[tuple[nn.Module, str]]] = {}
    for child in module.modules():
        unit = owned.get(id(child), module)
        places = [(child, name) for name, p in child._parameters.items() if p is not None and p in parameters]
        if places:
            units.setdefault(id(unit), []).extend(places)
    for unit in (*inner.values(), module):
        if id(unit) in units and "_widened" not in unit.__dict__:
            unit.__dict__["_widened"] = (unit.forward, units[id(unit)])
            unit.forward = MethodType(_forward, unit)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    inner: Callable[..., Any]
    inner, places = module.__dict__["_widened"]
    with _in_place(places):
        return inner(*args, **kwargs)


@contextmanager
def _in_place(places: list[tuple[nn.Module, str]]) -> Iterator[None]:
    """float32 where bfloat16 is kept. A parameter that is used in several places is widened once."""
    wide: dict[Any, Any] = {}
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    flat: list[tuple[nn.RNNBase, list[Any]]] = []
    try:
        for module, name in places:
            kept: Any = module._parameters[name]
            if isinstance(module, _UNDER_AUTOCAST) and torch.is_autocast_enabled(kept.device.type):
                continue
            if kept not in wide:
                wide[kept] = _Widened.apply(kept)  # type: ignore[no-untyped-call]
            changed.append((module._parameters, name, kept))
            module._parameters[name] = wide[kept]
            if isinstance(module, nn.RNNBase):
                if not flat or flat[-1][0] is not module:
                    flat.append((module, module._flat_weights))
                weights = [w if w is None else wide.get(w, w) for w in flat[-1][1]]
                module._flat_weights = weights
        yield
    finally:
        for held, name, kept in changed:
            held[name] = kept
        for rnn, weights in flat:
            rnn._flat_weights = weights
