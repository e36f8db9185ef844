"""A step by the C++ kernels of shoal/comm/native/generation: the whole forward pass in one call, bits that depend on
nothing but the sequence itself, not even on the number of threads or the width of the processor's vectors."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shoal.comm.native import build
from shoal.models.gpt import GPT
from shoal.serve.generation.packing import large_memory, packed_once
from shoal.serve.generation.part import Part, whole
from shoal.serve.generation.step import BLOCK, Floats, Rows, Shape, shape_of

_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2}
KERNELS = {"best": 0, "plain": 1, "avx2": 2, "avx512": 3}
Kernels = Literal["best", "plain", "avx2", "avx512"]


_Sum = ctypes.CFUNCTYPE(None, ctypes.c_int64)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in (
        "layers", "heads", "head_size", "width", "ffn", "vocab", "activation", "tied", "half", "blocks",
        "first_token", "sliced", "experts", "top_k", "first_expert", "own_experts",
    )] + [("eps", ctypes.c_double)]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("wanted", ctypes.c_int64),
        ("wants", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("routes", ctypes.c_void_p),
        ("entered", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("sum", _Sum),
    ]


def available(kernels: Kernels = "best") -> bool:
    """Whether the C++ parts are there, with this variant of them."""
    library = build.generation()
    return library is not None and bool(library.generation_has(ctypes.c_int64(KERNELS[kernels])))


class NativeStage:
    """See `step.Stage`. ``half``: weights in bfloat16, everything else in float32. Its threads are made here: not to be
    made before a fork. Raises RuntimeError where `available` is False.

    ``weights`` as `packing.packed` makes them of the part; ``sum`` is that of tensors over the parts of a stage."""

    def __init__(
        self,
        shape: Shape,
        part: Part,
        weights: Sequence[Tensor | None],
        blocks: int,
        *,
        threads: int = 1,
        half: bool = False,
        kernels: Kernels = "best",
        sum: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        library = build.generation()
        if library is None or not available(kernels):
            raise RuntimeError(f"no {kernels} generation kernels: {build.why_not(['generation'])}")
        self.blocks = blocks
        self.name = f"native-{kernels}" + ("-bfloat16" if half else "")
        self._part, self._which = part, ctypes.c_int64(KERNELS[kernels])
        self._width, self._ffn, self._vocab = shape.width, len(part.ffn), len(part.vocab)
        self._inner = len(part.heads) * shape.head_size
        self._weights = weights
        self._pointers = (ctypes.c_void_p * len(weights))(*(0 if w is None else w.data_ptr() for w in weights))
        cache = large_memory(blocks * part.block_bytes(shape)).view(torch.float32)
        self._keys, self._values = cache.view(2, len(part.layers), blocks, self._inner * BLOCK)
        self._c_shape = _Shape(
            len(part.layers), len(part.heads), shape.head_size, shape.width, self._ffn, self._vocab,
            _ACTIVATIONS[shape.activation], int(shape.tied), int(half), blocks, part.vocab.start,
            int(part.sliced(shape)), shape.experts, shape.top_k, part.experts.start, len(part.experts), shape.eps,
        )  # fmt: skip
        self._threads = threads
        self._experts, self._picks = shape.experts, shape.top_k
        self._scratch, self._routes = torch.empty(0), torch.empty(0, dtype=torch.int64)
        self._sum, self._partial = sum, torch.empty(0)
        self._lost: Exception | None = None  # what ended a sum over the slices
        self._c_sum = _Sum(self._sum_partial if sum is not None else 0)
        self._library = library
        library.generation_team.restype = ctypes.c_void_p
        self._team: Any = ctypes.c_void_p(library.generation_team(ctypes.c_int64(threads)))
        self._run, self._copy = library.generation_step, library.generation_copy
        self._run.restype = self._copy.restype = None

    def compute(self, rows: Rows, entered: Tensor | None) -> Tensor:
        count, wanted, stride = len(rows.tokens), len(rows.wants), rows.tables.shape[1]
        inner, width, picks = self._inner, self._width, self._picks
        floats = count * (2 * width + 3 * inner + max(inner, picks * self._ffn)) + self._threads * stride * BLOCK
        if self._experts:
            floats += count * (self._experts + picks + picks * width)
            if self._routes.numel() < 3 * count * picks + self._experts + 1:
                self._routes = torch.empty(3 * count * picks + self._experts + 1, dtype=torch.int64)
        if self._scratch.numel() < floats:
            self._scratch = torch.empty(floats)
        made = self._logits(wanted) if self._part.last else torch.empty(count, width)
        if self._sum is not None:
            self._partial = torch.empty(count * picks * width)
        batch = _Batch(
            count, _pointer(rows.tokens), _pointer(rows.places), _pointer(rows.sequences), _pointer(rows.tables),
            stride, wanted, _pointer(rows.wants), made.data_ptr() if self._part.last else 0,
            self._keys.data_ptr(), self._values.data_ptr(), self._scratch.data_ptr(), self._routes.data_ptr(),
            0 if entered is None else entered.data_ptr(), 0 if self._part.last else made.data_ptr(),
            0 if self._sum is None else self._partial.data_ptr(), self._c_sum,
        )  # fmt: skip
        self._run(self._team, self._which, ctypes.byref(self._c_shape), self._pointers, ctypes.byref(batch))
        if self._lost is not None:
            raise self._lost
        return made

    def _logits(self, wanted: int) -> Tensor:
        return torch.empty(wanted, self._vocab)  # another process may still read those of the step before

    def _sum_partial(self, count: int) -> None:
        """Called in the middle of a step, where nothing may be raised."""
        assert self._sum is not None
        try:
            if self._lost is None:
                part = self._partial[:count]
                part.copy_(self._sum(part))
        except Exception as error:
            self._lost = error

    def copy(self, source: int, target: int) -> None:
        sizes = [ctypes.c_int64(n) for n in (len(self._part.layers), self.blocks, self._inner * BLOCK, source, target)]
        for cache in (self._keys, self._values):
            self._copy(ctypes.c_void_p(cache.data_ptr()), *sizes)

    def close(self) -> None:
        if self._team is not None:
            self._library.generation_disband(self._team)
            self._team = None


class NativeStep(NativeStage):
    """See `step.Step`: the whole model in one stage."""

    def __init__(
        self,
        model: GPT,
        blocks: int,
        *,
        threads: int = 1,
        half: bool = False,
        kernels: Kernels = "best",
    ) -> None:
        shape = shape_of(model)
        self.vocab, self.context = shape.vocab, shape.context
        weights = packed_once(model, torch.bfloat16 if half else torch.float32)
        super().__init__(shape, whole(shape), weights, blocks, threads=threads, half=half, kernels=kernels)
        self._kept = torch.empty(0, shape.vocab)

    def run(self, rows: Rows) -> Floats:
        logits: Floats = self.compute(rows, None).numpy()
        return logits

    def _logits(self, wanted: int) -> Tensor:
        if len(self._kept) < wanted:
            self._kept = torch.empty(wanted, self.vocab)
        return self._kept[:wanted]


def _pointer(array: "np.ndarray[Any, Any]") -> int:
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]  # array.ctypes takes three times as long
    return address
