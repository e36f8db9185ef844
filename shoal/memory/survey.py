"""Fills a table: one micro-batch, with every block computed again in full, so that it takes as little as can be."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from shoal.memory.gauge import Gauge
from shoal.memory.meter import Hold, sizes_of
from shoal.memory.operations import draws, kind_of, makes_new, tensors_of
from shoal.memory.recompute import Block, Pass
from shoal.memory.rehearsal import Passes, rehearse
from shoal.memory.table import BlockCost, Table
from shoal.recipe.memory_plan import CHEAP

FLOPS_A_BYTE = 64  # arithmetic that takes as long as moving a byte: cores and accelerators of today, within 2 or 3
ATTENTION_SHARE = 0.25  # of that rate, which attention kernels reach


def survey(module: nn.Module, blocks: Sequence[Block], passes: Passes, gauge: Gauge) -> Table:
    """Work is counted, not timed: shapes alone decide, and the table is the same each time.

    ``passes``: of one micro-batch, through the worker's chunks one after the other.
    ``blocks``: all that may be recomputed, in a store that keeps things where they are."""
    inside = _Survey(blocks)
    with inside.watching():
        rehearse(module, passes, gauge, forward_done=inside.chunk_done)
    return inside.table()


class _Survey:
    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._meter = blocks[0].store.meter
        self._rows: dict[str, BlockCost] = {}
        self._kept_by_blocks = 0
        self._outside: list[int] = []  # of the chunks that are done

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        modes = [block.mode for block in self._blocks]
        for block in self._blocks:
            block.mode, block.observer = "full", self._observe
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._meter.hold, Hold.get):
                yield
        finally:
            for block, mode in zip(self._blocks, modes, strict=True):
                block.mode, block.observer = mode, None

    def chunk_done(self) -> None:
        """Its forward pass is over."""
        self._outside.append(self._meter.live - self._kept_by_blocks - sum(self._outside))

    def _observe(self, block: Block, begin: Callable[[], Pass]) -> Any:
        live, held = self._meter.live, self._meter.storages()
        this = begin()
        inputs, own = self._meter.live - live, self._meter.storages() - held
        received = sum(sizes_of(this.given).values())
        seen: list[tuple[int, Tensor]] = []
        with _Observe() as operations:
            output = this.first(lambda tensor: seen.append((len(operations.done), tensor.detach())))
        done = operations.done[: seen[-1][0] if seen else 0]  # the pass done again stops at the last saved tensor
        here = (tensor for _, tensor in seen if not self._meter.elsewhere(tensor))
        saved = {key: size for key, size in sizes_of(here).items() if key not in held}
        outputs = sizes_of(t for t in tree_leaves(output) if isinstance(t, Tensor))
        dear = [each for each in done if each.kind not in CHEAP and each.results and not outputs.keys() & each.results]
        results = {key: size for each in dear for key, size in each.results.items() if key not in own | held}
        work = sum(each.work for each in done)
        filled = inputs + sum(size for key, size in saved.items() if key not in own)
        row = BlockCost(
            name=block.name,
            outside=live - self._kept_by_blocks - sum(self._outside),
            inputs=inputs,
            plain=sum(saved.values()),
            selective=inputs + sum(results.values()),
            filled=filled,
            selective_filled=filled + sum(size for key, size in results.items() if key not in saved),
            full_work=work,
            selective_work=work - sum(each.work for each in dear),
            received=received,
            outputs=sum(outputs.values()),
            chunk=len(self._outside),
        )
        self._kept_by_blocks += inputs
        before = self._rows.get(row.name)
        self._rows[row.name] = row if before is None else _twice(before, row)
        return output

    def table(self) -> Table:
        return Table(blocks=tuple(self._rows.values()), outside=tuple(self._outside))


@dataclass(frozen=True)
class _Done:
    """One operation of a pass."""

    kind: str
    work: float
    results: Mapping[int, int]  # storage -> bytes; empty where they could not be kept


class _Observe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A pass that writes down what it does, and holds on to the results until it has been looked through."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[_Done] = []
        self._held: list[Tensor] = []  # or a number of a storage might come twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kept = tensors_of(result) if makes_new(func) and not draws(func, args, kwargs) else []
        self._held += [tensor.detach() for tensor in kept]
        self.done.append(_Done(kind_of(func), _work(func, args, kwargs, result), sizes_of(kept)))
        return result


def _work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float:
    """In bytes that memory moves: those read and written, and arithmetic beyond that. A view is free."""
    if not makes_new(func) and not func._schema.is_mutable:
        return 0.0
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in (*given, *tensors_of(result)))
    kind = kind_of(func)
    if kind == "attention":
        query, key = given[0], given[1]
        return moved + 4 * query.numel() * key.shape[-2] / (FLOPS_A_BYTE * ATTENTION_SHARE)
    if kind not in ("matmul", "convolution"):
        return moved
    counted = flop_registry.get(func._overloadpacket)
    if counted is not None:
        return moved + float(counted(*args, **kwargs, out_val=result)) / FLOPS_A_BYTE
    weights = [t for t in given if t.dim() == 2]  # a fused recurrent layer: each is applied to every step of the input
    rows = math.prod(given[0].shape[:-1])
    return moved + 2 * rows * sum(t.numel() for t in weights if t is not given[0]) / FLOPS_A_BYTE


def _twice(one: BlockCost, other: BlockCost) -> BlockCost:
    """A block that is called more than once in a pass."""
    return replace(
        one,
        inputs=one.inputs + other.inputs,
        plain=one.plain + other.plain,
        selective=one.selective + other.selective,
        filled=max(one.filled, other.filled),
        selective_filled=max(one.selective_filled, other.selective_filled),
        full_work=one.full_work + other.full_work,
        selective_work=one.selective_work + other.selective_work,
        received=one.received + other.received,
        outputs=one.outputs + other.outputs,
    )
