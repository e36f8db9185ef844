"""torch.optim.SGD in one pass over memory, to the same bits, which also writes new weights where a worker reads them.

Torch goes over memory once for each of its operations, and the copy is one more.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shoal.comm.native import build
from shoal.comm.past_cache import MOST_THREADS

_FUNCTIONS = {torch.float32: "shoal_sgd_f32", torch.float64: "shoal_sgd_f64"}
_TORCH_ONLY = ("maximize", "foreach", "fused", "differentiable")


def usable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` can make this optimiser's next step, as torch would."""
    return (
        type(optimizer) is torch.optim.SGD
        and not any(group[option] for group in optimizer.param_groups for option in _TORCH_ONLY)
        and all(isinstance(group["lr"], float | int) for group in optimizer.param_groups)
        and all(_plain(parameter) for group in optimizer.param_groups for parameter in group["params"])
        and torch.get_num_threads() <= MOST_THREADS
        and rounds_as_torch()
    )


def _plain(parameter: Tensor) -> bool:
    gradient = parameter.grad
    alike = gradient is None or (gradient.dtype == parameter.dtype and gradient.is_contiguous())
    return alike and parameter.dtype in _FUNCTIONS and parameter.device.type == "cpu" and parameter.is_contiguous()


@lru_cache(maxsize=1)
def rounds_as_torch() -> bool:
    """Whether the kernels are there, and torch rounds a multiply-add once, as they do: not on every processor."""
    if build.kernels() is None:
        return False
    tries = torch.Generator().manual_seed(0)
    weights, gradient = torch.randn(2, 1000, generator=tries)
    twin = weights.clone().add_(gradient, alpha=-0.1)
    _descend(weights, gradient, None, None, {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0,
                                             "nesterov": False}, first=False)  # fmt: skip
    return torch.equal(weights, twin)


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer, copies: Mapping[Tensor, Tensor]) -> None:
    """One step of an optimiser that is `usable`. ``copies``: parameter -> where its new value is written too, a tensor
    alike; a parameter without a gradient is left alone, and so is its copy."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            velocity, first = None, False
            if group["momentum"] != 0:
                state = optimizer.state[parameter]
                velocity = state.get("momentum_buffer")
                first = velocity is None
                if velocity is None:
                    velocity = state["momentum_buffer"] = torch.empty_like(parameter)
            _descend(parameter, parameter.grad, velocity, copies.get(parameter), group, first=first)


def _descend(
    weights: Tensor,
    gradient: Tensor,
    velocity: Tensor | None,
    copy: Tensor | None,
    group: Mapping[str, Any],
    *,
    first: bool,
) -> None:
    library = build.kernels()
    assert library is not None  # `usable` was asked
    tensors: Sequence[Tensor | None] = (weights, gradient, velocity, copy)
    numbers = (-group["lr"], group["weight_decay"], group["momentum"], 1 - group["dampening"])
    getattr(library, _FUNCTIONS[weights.dtype])(
        *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
        ctypes.c_int64(weights.numel()),
        *(ctypes.c_double(number) for number in numbers),
        ctypes.c_int32(bool(group["nesterov"])),
        ctypes.c_int32(first),
    )
