"""The engine of models that answer with one forward pass: classes, vectors, spans of answers, plain tensors."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from shoal.serve.batching import Batch, Batcher, Waiting, padded
from shoal.serve.engine import FIGURES_EVERY_S, Begun, Failed, Figures, FromEngine, Request, Result, Tell
from shoal.serve.forward import Forward, open_forward
from shoal.serve.payloads import Array, Inputs, Outputs, array

ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of the histogram of batch sizes
TRIED_SAMPLES = 4  # of a shape, until its rows are taken to be alike
MOST_SHAPES = 1024  # that are tried: clients choose them
_inputs = msgspec.msgpack.Decoder(Inputs)
_encode = msgspec.msgpack.Encoder().encode


class BatchEngine:
    """What waits, in batches, and what is told of it; not what computes them.

    ``invariant``: requests share a forward pass only where that keeps their bits (`_in_company`); then every pass of
    samples of one (padded) length has one shape, with a mask and as many rows as a batch can have. Others go alone."""

    def __init__(self, pad: int, batcher: Batcher, context: int, tell: Tell, invariant: bool = False) -> None:
        self._invariant = invariant
        self._pad = pad
        self._batcher = batcher
        self._context = context
        self._tell = tell
        self._open: dict[int, tuple[Request, Inputs]] = {}
        self._began_busy = 0.0  # since when there has been something to do; 0.0: there is nothing
        self._told_at = 0.0
        self._untold = False
        self._counts: dict[str, float] = dict.fromkeys(
            (
                *("batches_total", "rows_total", "tokens_total", "padding_tokens_total", "failed_total"),
                *("forward_seconds_total", "busy_seconds_total"),
                *(f'batch_rows_bucket{{le="{bound}"}}' for bound in ROWS_BOUNDS),
            ),
            0.0,
        )

    def add(self, request: Request) -> None:
        try:
            inputs = _inputs.decode(request.payload)
            group = _group(inputs)
        except (msgspec.DecodeError, ValueError) as error:
            self._tell([Failed(request.id, 400, f"the request's arrays cannot be read: {error}")])
            return
        if inputs.length > self._context > 0:
            why = f"{inputs.length} tokens are more than the model's context of {self._context}"
            self._tell([Failed(request.id, 400, why)])
            return
        if not 1 <= inputs.rows <= self._batcher.most_rows:
            why = f"{inputs.rows} samples in one request: send between 1 and {self._batcher.most_rows}"
            self._tell([Failed(request.id, 400, why)])
            return
        if self._invariant:
            group = _shape(inputs) if self._in_company(inputs) else request.id
        if not self._open:
            self._began_busy = time.monotonic()
        self._open[request.id] = request, inputs
        self._batcher.add(
            Waiting(
                request.id,
                inputs.rows,
                inputs.length,
                group,
                request.arrived,
                request.priority,
                request.deadline,
            )
        )

    def cancel(self, id: int) -> None:
        if self._batcher.drop(id):
            del self._open[id]
            self._rest()

    def next_at(self, now: float) -> float | None:
        due = self._batcher.next_at(now)
        if self._untold:  # the last figures before it falls idle; then there is nothing to wake up for
            return self._figures_at() if due is None else min(due, self._figures_at())
        return due

    def _figures_at(self) -> float:
        return self._told_at + FIGURES_EVERY_S

    def _taken(self, now: float) -> Batch | None:
        """The batch that leaves now, without those that come too late; None when none has to leave."""
        batch = self._batcher.take(now)
        if batch is not None and batch.late:
            self._tell([Failed(id, 504, "could not be answered before its time was over") for id in batch.late])
            for id in batch.late:
                del self._open[id]
        return batch

    def _tensors(self, inputs: list[Inputs], batch: Batch) -> dict[str, Tensor]:
        in_company = self._invariant and self._in_company(inputs[0])
        return _joined(inputs, batch, self._pad, self._batcher.most_rows if in_company else 0)

    def _in_company(self, inputs: Inputs) -> bool:
        """Whether a sample of this shape has the same bits in any row of a full batch, whatever the others are."""
        return False

    def _failed(self, id: int, why: str) -> Failed:
        self._counts["failed_total"] += 1
        return Failed(id, 500, f"the model failed on this input: {' '.join(why.split())[:200]}")

    def _count(self, batch: Batch, seconds: float) -> None:
        counts = self._counts
        counts["batches_total"] += 1
        counts["rows_total"] += batch.rows
        counts["tokens_total"] += batch.tokens if batch.length else 0
        counts["padding_tokens_total"] += batch.padding
        counts["forward_seconds_total"] += seconds
        for bound in ROWS_BOUNDS:
            counts[f'batch_rows_bucket{{le="{bound}"}}'] += batch.rows <= bound

    def _rest(self) -> None:
        """Nothing may be left to do: the time since something was, was busy."""
        if not self._open:
            self._counts["busy_seconds_total"] += time.monotonic() - self._began_busy

    def _tell_figures(self) -> None:
        now = time.monotonic()
        if now - self._told_at < FIGURES_EVERY_S:
            return
        self._told_at, self._untold = now, False
        busy = self._counts["busy_seconds_total"] + (now - self._began_busy if self._open else 0.0)
        share = self._counts["forward_seconds_total"] / busy if busy > 0 else 0.0
        self._tell([Figures({**self._counts, "busy_seconds_total": busy, "share_of_bare_forward": share})])


class SinglePass(BatchEngine):
    """One batch after the other, in this process."""

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        pad: int,
        batcher: Batcher,
        context: int,
        tell: Tell,
        invariant: bool = False,
    ) -> None:
        super().__init__(pad, batcher, context, tell, invariant)
        self._model = model
        self._forward = forward
        self._alike: dict[Hashable, bool] = {}  # shape of a sample -> whether all rows of a batch compute alike

    def _in_company(self, inputs: Inputs) -> bool:
        """Found out at the first sample of a shape: its copies in all rows must come out with the same bits.

        In what order a matmul sums depends on its shape and, at its edges, on the row; not on what stands in other
        rows."""
        shape = _shape(inputs)
        if shape not in self._alike and len(self._alike) < MOST_SHAPES:
            with suppress(Exception):  # a model's own code may raise anything: the request itself will tell
                self._alike[shape] = all(self._rows_alike(turned) for turned in _turned(inputs))
        return self._alike.get(shape, False)

    def _rows_alike(self, inputs: Inputs) -> bool:
        batch = Batch((0,), inputs.rows, padded(inputs.length), inputs.rows * (inputs.length or 1))
        tensors = _joined([inputs], batch, self._pad, self._batcher.most_rows)
        alike = True

        def compare(module: nn.Module, given: Any, made: Any) -> None:
            nonlocal alike
            alike = alike and all(_rows_equal(t) for t in tree_leaves(made) if isinstance(t, Tensor))

        # inside of the model, too: an answer is few numbers, and rounding hides what was summed otherwise
        hooks = [module.register_forward_hook(compare) for module in self._model.modules()]
        try:
            outputs = self._forward({name: t[:1].expand_as(t).contiguous() for name, t in tensors.items()})
        finally:
            for hook in hooks:
                hook.remove()
        return alike and all(_rows_equal(torch.from_numpy(rows)) for rows in outputs.values())

    def work(self, now: float) -> None:
        batch = self._taken(now)
        if batch is None:
            self._tell_figures()
            return
        if batch.ids:
            self._tell([Begun(batch.ids, time.monotonic())])
            self._untold = True
            answers = self._answers(batch)
            self._tell([*answers, Begun((), time.monotonic())])
        self._rest()
        self._tell_figures()

    def _answers(self, batch: Batch) -> list[FromEngine]:
        pairs = [self._open.pop(id) for id in batch.ids]
        requests, inputs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        begun = time.monotonic()
        try:
            outputs = self._forward(self._tensors(inputs, batch))
        except Exception as error:  # a model's own code may raise anything
            return self._one_by_one(requests, inputs, batch, error)
        seconds = time.monotonic() - begun
        self._batcher.time.seen(batch.rows * (batch.length or 1), seconds)
        self._count(batch, seconds)
        return results(requests, inputs, batch, outputs)

    def _one_by_one(
        self, requests: list[Request], inputs: list[Inputs], batch: Batch, error: Exception
    ) -> list[FromEngine]:
        """What one request breaks must not harm those that happened to share its batch."""
        if len(requests) == 1:
            return [self._failed(requests[0].id, f"{type(error).__name__}: {error}")]
        answers: list[FromEngine] = []
        for request, one in zip(requests, inputs, strict=True):
            self._open[request.id] = request, one
            alone = Batch((request.id,), one.rows, padded(one.length), one.rows * (one.length or 1))
            answers += self._answers(alone)
        return answers


def _shape(inputs: Inputs) -> Hashable:
    return padded(inputs.length), _group(inputs)


def _rows_equal(rows: Tensor) -> bool:
    return rows.dim() == 0 or torch.equal(rows, rows[:1].expand_as(rows))


def _turned(inputs: Inputs) -> Iterator[Inputs]:
    """The samples, and others of their shape: what two rows sum differently may by chance come out the same."""
    for places in range(TRIED_SAMPLES):
        arrays = {n: np.roll(one.numpy(), places, min(one.numpy().ndim - 1, 1)) for n, one in inputs.arrays.items()}
        yield Inputs(inputs.rows, inputs.length, {name: array(one) for name, one in arrays.items()})


def _group(inputs: Inputs) -> Hashable:
    """Raises ValueError when the arrays are not what ``rows`` and ``length`` say."""
    if not inputs.arrays:
        raise ValueError("no array")
    fixed = []
    for name, one in sorted(inputs.arrays.items()):
        one.check()
        start = (inputs.rows, inputs.length) if inputs.length else (inputs.rows,)
        if one.shape[: len(start)] != start:
            raise ValueError(f"{name!r} has the shape {list(one.shape)}, which does not start with {list(start)}")
        fixed.append((name, one.dtype, one.shape[len(start) :]))
    return bool(inputs.length), *fixed


def _joined(inputs: list[Inputs], batch: Batch, pad: int, fixed: int = 0) -> dict[str, Tensor]:
    """The batch's tensors: [rows, ...], texts padded to [rows, length] with a bool "mask" where anything is padded.

    ``fixed``: with a mask in any case, and so many rows: the missing ones are copies of the first."""
    joined: dict[str, Tensor] = {}
    for name in inputs[0].arrays:
        if not batch.length:
            whole = np.concatenate([one.arrays[name].numpy() for one in inputs])
        else:
            whole = _padded(inputs, name, batch, pad if name == "tokens" else 0)
        joined[name] = torch.from_numpy(whole)
    if batch.padding or (fixed and batch.length):
        lengths = np.repeat([one.length for one in inputs], [one.rows for one in inputs])
        joined["mask"] = torch.from_numpy(np.arange(batch.length) < lengths[:, None])
    missing = fixed - batch.rows
    if missing > 0:
        return {name: torch.cat([t, t[:1].expand(missing, *t.shape[1:])]) for name, t in joined.items()}
    return joined


def _padded(inputs: list[Inputs], name: str, batch: Batch, fill: int) -> NDArray[Any]:
    first = inputs[0].arrays[name]
    shape = batch.rows, batch.length, *first.shape[2:]
    if not batch.padding and np.dtype(first.dtype).kind in "iu":
        return np.frombuffer(bytearray().join([one.arrays[name].data for one in inputs]), first.dtype).reshape(shape)
    whole = np.full(shape, fill, first.dtype)
    row = 0
    for one in inputs:
        whole[row : row + one.rows, : one.length] = one.arrays[name].numpy()
        row += one.rows
    return whole


def results(
    requests: list[Request], inputs: list[Inputs], batch: Batch, outputs: Mapping[str, NDArray[Any]]
) -> list[FromEngine]:
    """The batch's outputs, each request's own rows of them."""
    answers: list[FromEngine] = []
    cuts = [(name, _cutter(values, batch)) for name, values in outputs.items()]
    row = 0
    for request, one in zip(requests, inputs, strict=True):
        mine = {name: cut(row, one) for name, cut in cuts}
        answers.append(Result(request.id, msgspec.Raw(_encode(Outputs(mine)))))
        row += one.rows
    return answers


def _cutter(values: NDArray[Any], batch: Batch) -> Callable[[int, Inputs], Array]:
    """Gives a request's rows, from a first one on: without the places of padding, where there is one for each token."""
    if batch.length and values.ndim > 2 and values.shape[1] == batch.length:
        return lambda row, one: array(values[row : row + one.rows, : one.length])
    whole, shape = array(values), values.shape[1:]
    size = len(whole.data) // max(1, len(values))

    def cut(row: int, one: Inputs) -> Array:
        return Array(whole.dtype, (one.rows, *shape), whole.data[row * size : (row + one.rows) * size])

    return cut


def prepare(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Nothing: the weights are used as they are."""


def open_engine(model: nn.Module, facts: Mapping[str, Any], options: Mapping[str, Any], tell: Tell) -> SinglePass:
    batcher = Batcher(options["batch"], options["latency_ms"] / 1000)
    forward, pad, context = open_forward(model, facts), facts.get("pad", 0), facts.get("context", 0)
    return SinglePass(model, forward, pad, batcher, context, tell, options["invariant"])
