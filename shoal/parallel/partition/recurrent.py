"""Stacked recurrent layers one by one, so that a cut may lie between them.

``nn.LSTM`` and its kin compute all their layers in one call. The same calls, layer for layer and with dropout between
them, give the same bits (aten/src/ATen/native/RNN.cpp does so inside)."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.models.recurrent import LSTMLayers, lstm

_CALLS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


def is_stack(module: nn.Module, args: Sequence[Any]) -> TypeGuard[nn.RNNBase]:
    """Whether ``layer_by_layer`` can stand in for the module's own forward with these arguments."""
    return (
        type(module) in (nn.LSTM, LSTMLayers, nn.GRU, nn.RNN)
        and isinstance(module, nn.RNNBase)
        and module.num_layers > 1
        and not (module._forward_hooks or module._forward_pre_hooks)
        and len(args) > 0
        and isinstance(args[0], Tensor)  # not a packed sequence
        and len(args[0].shape) == 3  # with a batch
    )


def layer_by_layer(stack: nn.RNNBase, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """As the module's forward: [T, n, inputs], or [n, T, inputs] if batch first, and first states or None."""
    call = lstm if isinstance(stack, LSTMLayers) else _CALLS[stack.mode]
    x = input.transpose(0, 1) if stack.batch_first else input
    directions = 2 if stack.bidirectional else 1
    last: list[tuple[Tensor, ...]] = []
    for layer in range(stack.num_layers):
        own = slice(layer * directions, (layer + 1) * directions)
        begin = _zeros(stack, x, directions) if hx is None else _of_layer(hx, own)
        weights = [getattr(stack, name) for names in stack._all_weights[own] for name in names]
        x, *ends = call(x, begin, weights, stack.bias, 1, 0.0, stack.training, stack.bidirectional, False)
        if stack.dropout and layer + 1 < stack.num_layers:
            x = F.dropout(x, stack.dropout, stack.training)
        last.append(tuple(ends))
    ended = tuple(torch.cat(parts) for parts in zip(*last, strict=True))
    return x.transpose(0, 1) if stack.batch_first else x, ended if stack.mode == "LSTM" else ended[0]


def _zeros(stack: nn.RNNBase, x: Tensor, directions: int) -> Any:
    def zeros(size: int) -> Tensor:
        return torch.zeros(directions, x.shape[1], size, dtype=x.dtype, device=x.device)

    hidden = zeros(stack.proj_size or stack.hidden_size)
    return (hidden, zeros(stack.hidden_size)) if stack.mode == "LSTM" else hidden


def _of_layer(states: Any, own: slice) -> Any:
    return tuple(state[own] for state in states) if isinstance(states, tuple) else states[own]
