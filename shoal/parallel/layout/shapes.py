"""The shapes that flow through a model's modules, found out without computing anything."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shoal.models.moe import Mixture

Shapes = dict[str, tuple[torch.Size, torch.Size]]  # module -> what comes in first, what goes out first


def module_shapes(model: nn.Module, inputs: Sequence[Tensor] | Mapping[str, Any]) -> Shapes:
    """One forward pass on the device "meta", of ``inputs`` in order or by name. Of a module that is called several
    times, the last call counts."""
    found: Shapes = {}
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        first = next((x for x in given if isinstance(x, Tensor)), None)
        out = made[0] if isinstance(made, tuple) else made
        if isinstance(out, Tensor):
            found[names[module]] = (torch.Size(()) if first is None else first.shape, out.shape)

    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    for mixture in mixtures:  # where tokens go is no matter of shapes
        mixture.forward = _unchanged  # type: ignore[method-assign]
    hooks = [module.register_forward_hook(note) for module in names]
    state = {name: t.detach().to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
    named = inputs if isinstance(inputs, Mapping) else {}
    placed = () if isinstance(inputs, Mapping) else inputs
    try:
        with torch.no_grad():
            functional_call(
                model, state, tuple(map(_shape_only, placed)), {k: _shape_only(v) for k, v in named.items()}
            )
    finally:
        for hook in hooks:
            hook.remove()
        for mixture in mixtures:
            del mixture.forward
    return found


def _unchanged(x: Tensor) -> Tensor:
    return x


def _shape_only(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
