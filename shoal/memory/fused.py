"""The C++ kernels of 8-bit states, one pass over memory each, with the bits of their twins in `quantised.py`."""

import ctypes
from functools import lru_cache

from torch import Tensor

from shoal.comm.native import build

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES = {
    "shoal_quantised_encode": (_POINTER,) * 5 + (_SIZE,) * 2,
    "shoal_quantised_decode": (_POINTER,) * 4 + (_SIZE,),
}


@lru_cache(maxsize=1)
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = None, arguments
    return library


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: on a processor, in the order of their elements."""
    return all(t.device.type == "cpu" and t.is_contiguous() for t in tensors) and build.kernels() is not None


def encode(values: Tensor, codes: Tensor, scales: Tensor, least: Tensor, edges: Tensor, *, signed: bool) -> None:
    _call("shoal_quantised_encode", values, codes, scales, least, edges, values.numel(), int(signed))


def decode(codes: Tensor, scales: Tensor, table: Tensor, into: Tensor) -> None:
    _call("shoal_quantised_decode", codes, scales, table, into, into.numel())


def _call(name: str, *arguments: Tensor | int) -> None:
    library = build.kernels()
    assert library is not None  # `usable` was asked
    getattr(_declared(library), name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))
