"""torch.optim.SGD in one pass over memory, to the same bits, which also writes new weights where a worker reads them.

Torch goes over memory once for each of its operations, three times with momentum, and a copy is one more.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from shoal.comm.native import build
from shoal.comm.past_cache import MOST_THREADS

_FUNCTIONS = {torch.float32: "shoal_sgd_f32", torch.float64: "shoal_sgd_f64"}
_TORCH_ONLY = ("maximize", "foreach", "fused", "differentiable")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def update(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``, in one pass over memory where that can be."""
    if usable(optimizer):
        step(optimizer, {})
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers ask for before they step
    else:
        optimizer.step()


def usable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` can make this optimiser's next step, as torch would."""
    return (
        type(optimizer) is torch.optim.SGD
        and not any(getattr(optimizer, hooks, None) for hooks in _HOOKS)
        and not _global_optimizer_pre_hooks
        and not _global_optimizer_post_hooks
        and _steps_by_itself(optimizer)
        and not any(group[option] for group in optimizer.param_groups for option in _TORCH_ONLY)
        and all(isinstance(group["lr"], float | int) for group in optimizer.param_groups)
        and all(_plain(each, optimizer.state) for group in optimizer.param_groups for each in group["params"])
        and torch.get_num_threads() <= MOST_THREADS
        and rounds_as_torch()
    )


def _steps_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether nobody has put something else in the place of its method, but for a scheduler that counts its calls."""
    own = vars(optimizer).get("step")
    return own is None or bool(getattr(own, "_wrapped_by_lr_sched", False))


def _plain(parameter: Tensor, states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
    if type(parameter) not in (Tensor, torch.nn.Parameter) or parameter.dtype not in _FUNCTIONS:
        return False
    beside = (parameter.grad, states.get(parameter, {}).get("momentum_buffer"))
    return all(_flat(each) and each.dtype == parameter.dtype for each in (parameter, *beside) if each is not None)


def _flat(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.is_contiguous()


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
            torch.autograd.graph.increment_version([parameter] if velocity is None else [parameter, velocity])


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
