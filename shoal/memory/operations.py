"""Kinds of operations, and a forward pass that keeps the results of some of them.

What a pass kept, the same pass done again takes instead of computing it (as torch.utils.checkpoint's selective
policies do); here a result that is written to later is not kept, and a draw of random numbers is always repeated.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.memory.meter import storage_of
from shoal.memory.store import Kept, Store

_KINDS = {
    "matmul": "mm addmm bmm baddbmm addbmm mv addmv dot linear _addmm_activation _thnn_fused_lstm_cell "
    "_thnn_fused_gru_cell mkldnn_rnn_layer _cudnn_rnn miopen_rnn lstm gru",
    "attention": "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward _efficient_attention_forward",
    "convolution": "convolution _convolution convolution_overrideable mkldnn_convolution cudnn_convolution",
    "activation": "gelu relu relu_ silu tanh sigmoid elu leaky_relu hardswish mish threshold softplus",
    "norm": "native_layer_norm native_batch_norm _native_batch_norm_legit _batch_norm_with_update "
    "cudnn_batch_norm miopen_batch_norm native_group_norm _fused_rms_norm rms_norm",
    "softmax": "_softmax _log_softmax _safe_softmax softmax log_softmax",
    "dropout": "native_dropout bernoulli bernoulli_ random_",
}
_KIND_OF = {f"aten::{name}": kind for kind, names in _KINDS.items() for name in names.split()}


def kind_of(operation: Any) -> str:
    """The kind of an ATen operation: see OPERATIONS in shoal/recipe/memory_plan.py."""
    return _KIND_OF.get(operation._schema.name, "elementwise")


def makes_new(operation: Any) -> bool:
    """It writes to nothing, and what it gives is no view of what it takes."""
    schema = operation._schema
    return not schema.is_mutable and all(result.alias_info is None for result in schema.returns)


def draws(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it takes random numbers: an attention kernel without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return False
    for index, argument in enumerate(operation._schema.arguments):
        if argument.name == "dropout_p":
            given = args[index] if index < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True


def tensors_of(value: Any) -> list[Tensor]:
    """Those that an operation gives."""
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in tensors_of(each)] if isinstance(value, tuple | list) else []


def _each(value: Any, change: Callable[[Any], Any], kind: type) -> Any:
    """A result with what it has of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    return type(value)(_each(part, change, kind) for part in value) if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class _Waiting:
    kept: Kept


@dataclass(frozen=True)
class _Result:
    value: Any  # as the operation gave it, with something that waits in the place of each tensor
    storages: frozenset[int]


class Results:
    """Results of one pass, by their place among all that might have been kept; None is computed again."""

    def __init__(self) -> None:
        self._kept: list[_Result | None] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, result: Any, store: Store) -> None:
        storages = frozenset(map(storage_of, tensors_of(result)))
        self._kept.append(
            _Result(_each(result, lambda tensor: _Waiting(store.keep(tensor.detach())), Tensor), storages)
        )

    def leave_out(self) -> None:
        self._kept.append(None)

    def cut(self, count: int) -> None:
        """Forget what came after the first ``count`` of them: nothing that is needed follows."""
        del self._kept[count:]

    def forget(self, storages: Collection[int]) -> None:
        for place, result in enumerate(self._kept):
            if result is not None and not result.storages.isdisjoint(storages):
                self._kept[place] = None

    def take(self, place: int) -> Any:
        """The result, once; None where it is computed again."""
        if place >= len(self._kept) or (result := self._kept[place]) is None:
            return None
        self._kept[place] = None
        return _each(result.value, lambda waiting: waiting.kept.get(), _Waiting)


class Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The first pass: keeps what operations of other kinds than ``dropped`` give."""

    def __init__(self, dropped: Collection[str], store: Store) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results = Results()
        self._dropped, self._store = dropped, store
        self._keeps: dict[Any, bool] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        keeps = self._keeps.get(func)
        if keeps is None:
            keeps = self._keeps[func] = kind_of(func) not in self._dropped and makes_new(func)
        if keeps:
            if draws(func, args, kwargs):
                self.results.leave_out()
            else:
                self.results.add(result, self._store)
        elif func._schema.is_mutable:
            arguments = func._schema.arguments
            given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
            written = {storage_of(t) for a, v in given if a.alias_info and a.alias_info.is_write for t in tensors_of(v)}
            self.results.forget(written)
        return result


class Reuse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The pass done again: takes what the first one kept, once, and computes the rest."""

    def __init__(self, dropped: Collection[str], results: Results) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dropped, self._results = dropped, results
        self._keeps: dict[Any, bool] = {}
        self._place = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keeps = self._keeps.get(func)
        if keeps is None:
            keeps = self._keeps[func] = kind_of(func) not in self._dropped and makes_new(func)
        if keeps:
            found = self._results.take(self._place)
            self._place += 1
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))
