"""What each piece of a model costs: seconds by the clock, or operations by counting, and bytes."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.first_values import FirstValues, on_demand, present
from shoal.parallel.partition.arguments import Example, bind
from shoal.parallel.partition.chunks import Chunk
from shoal.parallel.partition.line import Line
from shoal.parallel.partition.operations import Operations
from shoal.parallel.partition.pieces import Piece, names, starts
from shoal.parallel.partition.recorded import leaves, substitute
from shoal.parallel.partition.recording import record
from shoal.parallel.partition.splitting import split
from shoal.parallel.partition.undisturbed import undisturbed

RUNS = 5


def pieces(
    model: nn.Module,
    example: Example,
    *,
    clock: bool = True,
    runs: int = RUNS,
    first: FirstValues | None = None,
) -> tuple[Piece, ...]:
    """The pieces of a model in the order of its forward pass, with what each costs on an example batch.

    ``clock``: seconds of a forward and a backward pass, the median of ``runs`` after one to warm up. Without it the
    seconds are counted operations / 1e9, the same on every worker: workers that cut by the clock must share one
    worker's pieces. Leaves the model as it was; its gradients are not touched. Of a model on the meta device, whose
    ``first`` values are given, one piece at a time gets memory."""
    with on_demand(model, first):
        line = Line(record(model, example))
    return price(line, example, runs if clock else 0, first)


def piece_names(model: nn.Module, example: Example) -> tuple[str, ...]:
    """What ``pieces`` calls them, without what they cost."""
    line = Line(record(model, example))
    return names(line, starts(line))


def price(line: Line, example: Example, runs: int, first: FirstValues | None = None) -> tuple[Piece, ...]:
    """See ``pieces``; ``runs`` 0 counts operations."""
    if example is None:
        raise UserError("pieces cannot be measured without an example batch: give the arguments of one forward pass.")
    begins = starts(line)
    chunks = split(line, begins[1:]).chunks
    values: Mapping[str, Any] = bind(line.model, example).arguments
    found = []
    with undisturbed(line.model), torch.enable_grad():
        for name, chunk, end in zip(names(line, begins), chunks, (*begins[1:], 0), strict=True):
            with present(chunk.module, first):
                seconds, kept, values = _price(chunk, {**bind(line.model, example).arguments, **values}, runs)
            parameters = {id(p): p.numel() * p.element_size() for p in chunk.module.parameters()}
            found.append(Piece(name, seconds, sum(parameters.values()), kept, line.crossing_bytes(end) if end else 0))
    return tuple(found)


def _price(chunk: Chunk, values: Mapping[str, Any], runs: int) -> tuple[float, int, Mapping[str, Any]]:
    """(seconds, bytes kept for the backward pass, what the chunk gives)."""
    kept: dict[int, int] = {}
    with _count_saved(chunk, kept):
        outputs, _ = _forward(chunk, values)
    if runs:
        times = [_timed(lambda: _pass(chunk, values)) for _ in range(runs + 1)]
        seconds = statistics.median(times[1:])
    else:
        with Operations() as counted, torch.no_grad():
            _forward(chunk, values)
        made = sum(t.numel() for t in leaves(outputs) if isinstance(t, Tensor))
        seconds = 3 * (counted.total + made) / 1e9  # the backward pass of a matmul is two of its size
    return seconds, sum(kept.values()), substitute(outputs, _leave)


def _leave(a: Any) -> Any:
    return a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a


def _pass(chunk: Chunk, values: Mapping[str, Any]) -> None:
    outputs, inputs = _forward(chunk, values)
    ends = [t for t in leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    begins = [t for t in inputs if t.requires_grad] + [p for p in chunk.module.parameters() if p.requires_grad]
    if ends and begins:
        torch.autograd.grad(ends, begins, [torch.ones_like(t) for t in ends], allow_unused=True)


def _forward(chunk: Chunk, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """What the chunk gives, and the tensors that it was given."""
    inputs: list[Tensor] = []

    def arrive(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        inputs.append(a.detach().clone().requires_grad_(a.requires_grad and torch.is_grad_enabled()))
        return inputs[-1]

    given = {name: substitute(values[name], arrive) for name in chunk.inputs}
    return chunk.module({**given, **{name: values[name] for name in chunk.batch_inputs}}), inputs


@contextmanager
def _count_saved(chunk: Chunk, kept: dict[int, int]) -> Iterator[None]:
    """Fills ``kept``: storage -> bytes of what autograd keeps, but for the chunk's parameters."""
    own = {p.untyped_storage()._cdata for p in chunk.module.parameters()}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return t.detach()  # an operation that kept its own result would hold itself, for good

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield


def _timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - begun
