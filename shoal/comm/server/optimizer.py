"""Which optimisers a server can run on its slices, and how one is told to it: a name and plain values, never code."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shoal.errors import UserError

if TYPE_CHECKING:
    import torch

# Each element's update depends on that element alone: a slice of the tensor gives the same bits.
ELEMENTWISE = frozenset(
    ["SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
)  # fmt: skip
_NEVER = {"LBFGS": "evaluates the loss again inside of its step", "SparseAdam": "takes sparse gradients only"}


def check(optimizer: "torch.optim.Optimizer") -> str:
    """The optimiser's name in torch.optim. Raises UserError when no server could run it."""
    import torch

    kind = type(optimizer)
    name = kind.__name__
    if getattr(torch.optim, name, None) is not kind:
        raise UserError(
            f"a parameter server runs the optimisers of torch.optim, not {kind.__module__}.{name}: "
            f"use one of {', '.join(sorted(ELEMENTWISE))}, or sync = 'exact'."
        )
    if name in _NEVER:
        raise UserError(f"{name} {_NEVER[name]}, which a parameter server cannot do: use another optimiser.")
    return name


def needs_whole(name: str, dtypes: Sequence["torch.dtype"]) -> bool:
    """Whether tensors must not be cut: for optimisers that look at whole tensors, and for types of less than 32 bits,
    which some of torch's kernels round otherwise in the last elements of a tensor."""
    return name not in ELEMENTWISE or any(dtype.itemsize < 4 for dtype in dtypes)


def plain(value: Any) -> Any:
    """An option as JSON holds it. Raises UserError for what is not plain."""
    import torch

    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return {"tensor": value.item()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    raise UserError(f"a {type(value).__name__} among the optimiser's options cannot be sent to a parameter server.")


def restored(value: Any) -> Any:
    import torch

    if isinstance(value, Mapping):
        return torch.tensor(float(value["tensor"]))
    if isinstance(value, list):
        return tuple(restored(v) for v in value)
    return value


def options_of(optimizer: "torch.optim.Optimizer") -> list[dict[str, Any]]:
    """The options of each group, without its parameters."""
    return [{k: plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def build(
    name: str, defaults: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Any]]
) -> "torch.optim.Optimizer | None":
    """The optimiser over each group's ``members``; None when no group has any. Raises UserError for unknown names."""
    import inspect

    import torch

    if name not in dir(torch.optim) or name in _NEVER or not name[0].isupper():
        raise UserError(f"torch.optim has no optimiser {name!r} that a server could run.")
    cls = getattr(torch.optim, name)
    if not inspect.isclass(cls) or not issubclass(cls, torch.optim.Optimizer) or cls is torch.optim.Optimizer:
        raise UserError(f"torch.optim.{name} is no optimiser.")
    known = set(inspect.signature(cls).parameters)
    filled = [
        {"params": list(own), **{key: restored(value) for key, value in options.items()}}
        for own, options in zip(members, groups, strict=True)
        if own
    ]
    if not filled:
        return None
    common = {key: restored(value) for key, value in defaults.items() if key in known}
    made: torch.optim.Optimizer = cls(filled, **common)
    return made
