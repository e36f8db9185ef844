"""What requests of kind predict and embed carry, and what comes back: named arrays as plain bytes."""

from collections.abc import Mapping
from math import prod
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


class Array(msgspec.Struct, array_like=True, frozen=True):
    """A dense little-endian array in C order."""

    dtype: str  # one of DTYPES
    shape: tuple[int, ...]
    data: bytes

    def numpy(self) -> NDArray[Any]:
        """A read-only view. Raises ValueError when bytes, shape and dtype do not agree."""
        self.check()
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)

    def check(self) -> None:
        """Raises ValueError as ``numpy`` does."""
        size = _SIZES.get(self.dtype)
        if size is None:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if min(self.shape, default=0) < 0 or size * prod(self.shape) != len(self.data):
            raise ValueError(f"{len(self.data)} bytes are no {self.dtype} of the shape {list(self.shape)}")


_SIZES = {name: np.dtype(name).itemsize for name in DTYPES}
_NAMES = {np.dtype(name): name for name in DTYPES}  # numpy makes a dtype's name anew each time it is asked


def array(values: NDArray[Any]) -> Array:
    """Raises KeyError for a dtype that is not one of DTYPES."""
    return Array(_NAMES[values.dtype], values.shape, values.tobytes())


def dtype_name(values: NDArray[Any]) -> str | None:
    """None for a dtype that is not one of DTYPES."""
    return _NAMES.get(values.dtype)


class Inputs(msgspec.Struct, array_like=True, frozen=True):
    """One or several samples: dim 0 of every array is the sample.

    Texts: "tokens" int32 [rows, length] and perhaps "types" int32 [rows, length], without padding."""

    rows: int
    length: int  # tokens of each sample; 0: samples have no length, and all have one shape
    arrays: Mapping[str, Array]


class Outputs(msgspec.Struct, array_like=True, frozen=True):
    """Dim 0 is the sample. Classes: "scores" float32 [rows, classes]; embeddings: "vectors" float32 [rows, width];
    answers: "spans" float32 [rows, length, 2]; else what the model gave, as "output" or by the names that it used."""

    arrays: Mapping[str, Array]
