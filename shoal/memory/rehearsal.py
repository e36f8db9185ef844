"""Passes without a trace, forward and backward: what they take is measured, what they do is undone."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from shoal.memory.apply import device_of
from shoal.memory.gauge import Gauge
from shoal.parallel.pipeline.random_state import random_state, set_random_state

Loss = Callable[[], Tensor]  # the forward pass of one micro-batch
Passes = Callable[[Callable[[], None]], None]  # all passes; its argument is to be called after each forward pass


def passes_of(loss: Loss) -> Passes:
    """There and back."""

    def run(forward_done: Callable[[], None]) -> None:
        value = loss()
        forward_done()
        value.backward()  # type: ignore[no-untyped-call]

    return run


def rehearse(
    module: nn.Module,
    passes: Passes,
    gauge: Gauge,
    *,
    keep_gradients: bool = False,
    forward_done: Callable[[], None] = lambda: None,
) -> int:
    """The most bytes that ``passes`` take on top of what was held before.

    Gradients are dropped as they come, or with ``keep_gradients`` when all have; weights, buffers and random streams
    are afterwards what they were."""
    with _undone(module, keep_gradients), gauge.watching():
        gauge.restart()
        before = gauge.live()
        passes(forward_done)
        most = gauge.peak()
    return most - before


@contextlib.contextmanager
def _undone(module: nn.Module, keep_gradients: bool) -> Iterator[None]:
    device = device_of(module)
    state = random_state(device)
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    trained = [p for p in module.parameters() if p.requires_grad]
    hooks = []
    if not keep_gradients:
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in trained]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)
        set_random_state(state, device)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
