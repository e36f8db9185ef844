"""What an optimiser's states take, and its update while it runs, found out before there are any."""

from typing import Any

import torch
from torch import nn

from shoal.memory.gauge import Traced
from shoal.memory.meter import bytes_of, sizes_of


def optimizer_need(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of the states after the first update, and those that an update takes on top.

    An update is made on meta tensors of the same shapes, which have no memory. An optimiser that cannot be updated
    there is taken to hold two states a parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    try:
        states, update = _on_meta(optimizer)
    except Exception:  # an optimiser of somebody's own may do whatever it likes in its update
        return 2 * sum(bytes_of(p) for p in parameters), 0
    return max(states, sum(sizes_of(_tensors(optimizer)).values())), update


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors of its states, as they are now."""
    return sum(tensor.nbytes for tensor in _tensors(optimizer))


def _on_meta(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    fused = any(group.get("fused") for group in optimizer.param_groups)
    groups = []
    for group in optimizer.param_groups:
        own = {key: value for key, value in group.items() if key != "params"}
        if "fused" in own:
            own["fused"] = None
        accelerated = any(p.device.type == "cuda" for p in group["params"])
        if "foreach" in own and (own["foreach"] is None or fused):
            own["foreach"] = accelerated and not fused
        twins = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"] if p.requires_grad]
        for twin in twins:
            twin.grad = torch.empty_like(twin)
        groups.append({"params": twins, **own})
    make: Any = type(optimizer)
    twin_optimizer = make(groups)
    gauge = Traced()
    with gauge.watching():
        twin_optimizer.step()
    return gauge.live(), 0 if fused else gauge.peak() - gauge.live()


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
