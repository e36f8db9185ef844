"""A step by the C++ kernels of shoal/comm/native/generation: the whole forward pass in one call, bits that depend on
nothing but the sequence itself, not even on the number of threads or the width of the processor's vectors."""

import ctypes
from typing import Any, Literal

import numpy as np
import torch

from shoal.comm.native import build
from shoal.models.gpt import GPT
from shoal.serve.generation.packing import large_memory, packed_once
from shoal.serve.generation.step import BLOCK, Floats, Rows, shape_of

_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2}
KERNELS = {"best": 0, "plain": 1, "avx2": 2, "avx512": 3}
Kernels = Literal["best", "plain", "avx2", "avx512"]


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in (
        "layers", "heads", "head_size", "width", "ffn", "vocab", "activation", "tied", "half", "blocks"
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
    ]


def available(kernels: Kernels = "best") -> bool:
    """Whether the C++ parts are there, with this variant of them."""
    library = build.generation()
    return library is not None and bool(library.generation_has(ctypes.c_int64(KERNELS[kernels])))


class NativeStep:
    """See `step.Step`. ``half``: weights in bfloat16, everything else in float32. Its threads are made here: not to be
    made before a fork. Raises RuntimeError where `available` is False."""

    def __init__(
        self,
        model: GPT,
        blocks: int,
        *,
        threads: int = 1,
        half: bool = False,
        kernels: Kernels = "best",
    ) -> None:
        library = build.generation()
        if library is None or not available(kernels):
            raise RuntimeError(f"no {kernels} generation kernels: {build.why_not(['generation'])}")
        shape = shape_of(model)
        self.vocab, self.context, self.blocks = shape.vocab, shape.context, blocks
        self.name = f"native-{kernels}" + ("-bfloat16" if half else "")
        self._shape, self._which = shape, ctypes.c_int64(KERNELS[kernels])
        self._weights = packed_once(model, torch.bfloat16 if half else torch.float32)
        self._pointers = (ctypes.c_void_p * len(self._weights))(
            *(0 if w is None else w.data_ptr() for w in self._weights)
        )
        cache = large_memory(blocks * shape.block_bytes()).view(torch.float32)
        self._keys, self._values = cache.view(2, shape.layers, blocks, shape.width * BLOCK)
        self._c_shape = _Shape(
            shape.layers, shape.heads, shape.head_size, shape.width, shape.ffn, shape.vocab,
            _ACTIVATIONS[shape.activation], int(model.head is None), int(half), blocks, shape.eps,
        )  # fmt: skip
        self._threads = threads
        self._scratch, self._logits = torch.empty(0), np.empty((0, shape.vocab), np.float32)
        self._library = library
        library.generation_team.restype = ctypes.c_void_p
        self._team: Any = ctypes.c_void_p(library.generation_team(ctypes.c_int64(threads)))
        self._run, self._copy = library.generation_step, library.generation_copy
        self._run.restype = self._copy.restype = None

    def run(self, rows: Rows) -> Floats:
        shape, count, wanted, stride = self._shape, len(rows.tokens), len(rows.wants), rows.tables.shape[1]
        floats = count * (5 * shape.width + max(shape.width, shape.ffn)) + self._threads * stride * BLOCK
        if self._scratch.numel() < floats:
            self._scratch = torch.empty(floats)
        if len(self._logits) < wanted:
            self._logits = np.empty((wanted, self.vocab), np.float32)
        batch = _Batch(
            count, _pointer(rows.tokens), _pointer(rows.places), _pointer(rows.sequences), _pointer(rows.tables),
            stride, wanted, _pointer(rows.wants), _pointer(self._logits),
            self._keys.data_ptr(), self._values.data_ptr(), self._scratch.data_ptr(),
        )  # fmt: skip
        self._run(self._team, self._which, ctypes.byref(self._c_shape), self._pointers, ctypes.byref(batch))
        return self._logits[:wanted]

    def copy(self, source: int, target: int) -> None:
        sizes = [
            ctypes.c_int64(n) for n in (self._shape.layers, self.blocks, self._shape.width * BLOCK, source, target)
        ]
        for cache in (self._keys, self._values):
            self._copy(ctypes.c_void_p(cache.data_ptr()), *sizes)

    def close(self) -> None:
        if self._team is not None:
            self._library.generation_disband(self._team)
            self._team = None


def _pointer(array: "np.ndarray[Any, Any]") -> int:
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]  # array.ctypes takes three times as long
    return address
