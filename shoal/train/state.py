"""The state of a training run as named tensors and plain facts, and back: what a checkpoint holds."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import UserError


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name; tied ones under each of their names."""
    return {name: t.detach() for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """ "<parameter>/<key>" -> tensor, for every tensor in the optimiser's state."""
    return {
        f"{name}/{key}": value
        for name, state in _named_state(model, optimizer).items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def optimizer_facts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimiser holds beside tensors: the settings of its groups and plain per-parameter values."""
    return {"groups": optimizer_groups(optimizer), "values": optimizer_values(model, optimizer)}


def optimizer_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: _plain(v, k) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def optimizer_values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    values = {
        name: {key: _plain(value, key) for key, value in state.items() if not isinstance(value, Tensor)}
        for name, state in _named_state(model, optimizer).items()
    }
    return {name: state for name, state in values.items() if state}


def values_of(facts: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Of `optimizer_facts`, the plain values of these parameters."""
    return {name: values for name, values in facts["values"].items() if name in names}


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": value.item()}
    if isinstance(value, tuple | list):
        return [_plain(v, key) for v in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    raise UserError(f"the optimiser's {key!r} is {type(value).__name__}, which a checkpoint cannot hold.")


def _restored(value: Any, like: Any) -> Any:
    if isinstance(value, Mapping):
        return torch.tensor(value["tensor"])
    if isinstance(value, list):
        items = [_restored(v, None) for v in value]
        return items if isinstance(like, list) else tuple(items)
    return value


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Mapping[str, Any]]:
    names = _names(model) if optimizer.state else {}  # slices have none, and ask after each step
    try:
        return {names[id(parameter)]: state for parameter, state in optimizer.state.items()}
    except KeyError:
        raise UserError("the optimiser holds a parameter that is not the model's.") from None


def check_names(own: Collection[str], given: Collection[str]) -> None:
    """Raises UserError naming the first of a model's tensors that a checkpoint lacks or has beyond them."""
    for name in own:
        if name not in given:
            raise UserError(f"the checkpoint lacks the model's tensor {name!r}: it belongs to another model.")
    for name in given:
        if name not in own:
            raise UserError(f"the checkpoint has a tensor {name!r} that the model lacks: it belongs to another model.")


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError naming the first tensor that is missing, left over or of another shape."""
    own = model_tensors(model)
    check_names(own, tensors)
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape or own[name].dtype != tensor.dtype:
            raise UserError(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)} in the checkpoint and {own[name].dtype} "
                f"{list(own[name].shape)} in the model."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """The inverse of ``optimizer_tensors`` and ``optimizer_facts``. Raises UserError when the groups do not match."""
    if len(facts["groups"]) != len(optimizer.param_groups):
        raise UserError(
            f"the checkpoint's optimiser has {len(facts['groups'])} parameter groups, this one has "
            f"{len(optimizer.param_groups)}."
        )
    for group, saved in zip(optimizer.param_groups, facts["groups"], strict=True):
        group.update({key: _restored(value, group.get(key)) for key, value in saved.items()})
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        # step counters stay where the optimiser made them, moments lie beside their parameter
        device = parameter.device if tensor.shape == parameter.shape else tensor.device
        optimizer.state[parameter][key] = tensor.to(device, copy=True)
    for name, values in facts["values"].items():
        optimizer.state[parameters[name]].update({key: _restored(v, None) for key, v in values.items()})
