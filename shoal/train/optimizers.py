"""Optimisers by name: those of torch.optim, the fused kernels where there are some."""

import inspect
from typing import Any

import torch
from torch import nn

from shoal.errors import UserError, unknown_name
from shoal.recipe.recipe import OptimizerSpec

_TRUSTED = "torch.optim."  # optimisers known to leave p.grad as it is: Muon and Adafactor say "torch.optim" alone
_SHORT = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}


def optimizer_classes() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimiser of torch.optim that needs no closure and takes dense gradients, by its own name."""
    found = {
        name: cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)
    }
    return {name: cls for name, cls in found.items() if name not in ("Optimizer", "LBFGS", "SparseAdam")}


def make_optimizer(spec: OptimizerSpec, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters. Biases and norms (fewer than two dims) get no weight decay.

    Raises UserError for an unknown optimiser or option, with the nearest name."""
    classes = optimizer_classes()
    name = _SHORT.get(spec.name, spec.name)
    if name not in classes:
        raise unknown_name("optimizer", spec.name, [*classes, *_SHORT], "optimizer.name")
    cls = classes[name]
    known = [p for p in inspect.signature(cls).parameters if p not in ("params", "lr")]
    for option in spec.options:
        if option not in known:
            raise unknown_name("option", option, known, f"[optimizer] {spec.name}")
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.options.items()}
    if "fused" in known and "fused" not in options and "foreach" not in options:
        options["fused"] = True
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if p.dim() >= 2]},
                                    {"params": [p for p in trained if p.dim() < 2]}]  # fmt: skip
    if "weight_decay" in known:
        groups[1]["weight_decay"] = 0.0
    try:
        return cls(groups, lr=lr, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer {spec.name!r} does not take these options: {error}.") from None


def writes_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser may write to p.grad: those of torch.optim do not, but for some ``foreach`` kernels."""
    optimizer = getattr(optimizer, "inner", optimizer)  # shoal.memory.streamed's leaves them to the one inside
    trusted = f"{type(optimizer).__module__}.".startswith(_TRUSTED)
    return not trusted or any(group.get("foreach") for group in optimizer.param_groups)
