"""Counts operations, which are the same on every worker and at every run, where a clock is not."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _recurrent(x: torch.Tensor, w0: torch.Tensor, w1: torch.Tensor) -> int:
    """One layer: [T, n, inputs], [gates, inputs], [gates, hidden]."""
    return 2 * x.shape[0] * x.shape[1] * (w0.numel() + w1.numel())


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, adds up 2 x multiply-adds of matmuls, convolutions, attention and recurrent layers.

    (torch's own ``FlopCounterMode`` has the formulas, but it follows modules by hooks that a pass without gradients
    breaks, and it knows no fused recurrent layer.)"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _WHOLE and func._overloadpacket not in flop_registry:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        made = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **kwargs, out_val=made))
        elif packet is torch.ops.aten.mkldnn_rnn_layer:
            self.total += _recurrent(*args[:3])
        return made


_WHOLE = (torch.ops.prim.device.default,)
