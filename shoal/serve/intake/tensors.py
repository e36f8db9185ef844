"""Plain tensors: JSON numbers, NumPy and safetensors bodies, as the model takes them. Nothing is ever unpickled."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.serve.http.messages import HttpError
from shoal.serve.intake.task import finite, numbers, rows_of
from shoal.serve.payloads import Inputs, Outputs

NPY = ("application/x-npy", "application/npy")
SAFETENSORS = ("application/safetensors", "application/x-safetensors", "application/vnd.safetensors")
MOST_HEADER = 10_000  # characters of an npy header
_WHOLE = {"tokens": "int64", "types": "int64", "mask": "bool"}  # all other JSON numbers are float32


class Tensors:
    fields: Mapping[str, Any] = {
        "input": {"type": "array", "description": "numbers, nested; the first dim is the sample"},
        "inputs": {"type": "object", "minProperties": 1, "description": "several of these by name"},
    }
    alternatives: tuple[tuple[str, ...], ...] = (("input",), ("inputs",))
    example: Mapping[str, Any] = {"input": [[0.0]]}

    def __init__(self, facts: Mapping[str, Any], most_rows: int) -> None:
        self._most_rows = most_rows

    def read(self, body: Mapping[str, Any]) -> list[Any]:
        if ("input" in body) == ("inputs" in body):
            raise HttpError(400, "the body must have one of the fields 'input', 'inputs'", param="input")
        given = body["inputs"] if "inputs" in body else {"input": body["input"]}
        if not isinstance(given, dict) or not given:
            raise HttpError(400, "'inputs' must be an object of names and nested numbers", param="inputs")
        return [{name: numbers(value, name, _WHOLE.get(name, "float32")) for name, value in given.items()}]

    def inputs(self, sample: Any) -> list[Inputs]:
        return rows_of(sample, self._most_rows)

    def prediction(self, sample: Any, outputs: Sequence[Outputs]) -> Any:
        return {name: strict(values) for name, values in joined(outputs).items()}


def strict(values: NDArray[Any]) -> Any:
    """Nested lists; null for what JSON has no number for."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        plain = values.astype(object)
        plain[~np.isfinite(values)] = None
        return plain.tolist()
    return values.tolist()


def joined(outputs: Sequence[Outputs]) -> dict[str, NDArray[Any]]:
    """The pieces of a large request, one behind the other."""
    return {name: np.concatenate([output.arrays[name].numpy() for output in outputs]) for name in outputs[0].arrays}


def read_npy(body: bytes) -> NDArray[Any]:
    """The array of an .npy file. Raises HttpError 400 for anything else, an array of Python objects among it."""
    stream = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream, max_header_size=MOST_HEADER)
        if dtype.hasobject or dtype.names:
            raise ValueError("not plain numbers")
        count = 1
        for size in shape:
            count *= size
        rest = body[stream.tell() :]
        if count * dtype.itemsize != len(rest):
            raise ValueError("its size is not what its header says")
        values = np.frombuffer(rest, dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)
        if dtype.byteorder == ">":
            values = np.frombuffer(rest, dtype).astype(dtype.newbyteorder("<"))
        shaped = values.reshape(shape, order="F" if fortran else "C")
    except (ValueError, KeyError, TypeError, SyntaxError, EOFError, MemoryError, RecursionError) as error:
        raise HttpError(400, f"the body is not a whole .npy file of numbers: {error}") from None
    return finite(np.ascontiguousarray(shaped), "the body")


def write_npy(values: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(values), allow_pickle=False)
    return stream.getvalue()


def read_safetensors(body: bytes) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(body)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HttpError(400, f"the body is not a whole safetensors file of numbers: {error}") from None
    if not arrays:
        raise HttpError(400, "the safetensors body holds no tensor")
    return {name: finite(values, name) for name, values in arrays.items()}


def write_safetensors(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
