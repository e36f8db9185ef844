"""The C++ kernels, one pass over memory each. Where there is no compiler, the twins in PyTorch give the same bits."""

import ctypes
from functools import lru_cache

from torch import Tensor

from shoal.comm.native import build

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    **{
        f"shoal_{kind}_{action}": (None, (_POINTER,) * (3 if action == "compress" else 2) + (_SIZE,))
        for kind in ("bf16", "fp16", "int8", "onebit")
        for action in ("compress", "add", "restore")
    },
    "shoal_topk_compress": (ctypes.c_int32, (_POINTER,) * 3 + (_SIZE,) * 5),
    "shoal_topk_add": (ctypes.c_int32, (_POINTER,) * 2 + (_SIZE,) * 2),
}


@lru_cache(maxsize=1)
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def usable(numbers: Tensor) -> bool:
    return numbers.device.type == "cpu" and build.kernels() is not None


def call(name: str, *arguments: Tensor | int | None) -> int:
    """Call a kernel; tensors go by address, None as a null pointer. Its result, 0 where it has none."""
    library = build.kernels()
    assert library is not None  # `usable` was asked
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return getattr(_declared(library), name)(*plain) or 0
