"""What an intake is, and what all of them check."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.serve.http.messages import HttpError
from shoal.serve.payloads import DTYPES, Inputs, Outputs, array, dtype_name

MOST_SAMPLES = 1024  # of one HTTP request
MOST_ARRAYS = 8  # of one sample


class Intake(Protocol):
    """One task's way in and out. Everything raises HttpError 400 for what cannot be used."""

    fields: Mapping[str, Any]  # of the JSON body, as JSON schemas: for the description and the page
    alternatives: tuple[tuple[str, ...], ...]  # a body has the fields of exactly one of these
    example: Mapping[str, Any]  # a body that works

    def read(self, body: Mapping[str, Any]) -> list[Any]:
        """The samples of a JSON body, each a value for ``inputs``."""

    def inputs(self, sample: Any) -> list[Inputs]:
        """A sample as what goes into the model: one forward pass, or several (the windows of a long text)."""

    def prediction(self, sample: Any, outputs: Sequence[Outputs]) -> Any:
        """The JSON value that answers for the sample."""


def field(body: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The one of these fields that the body has."""
    found = [name for name in names if name in body]
    if len(found) != 1:
        raise HttpError(400, f"the body must have one of the fields {', '.join(map(repr, names))}", param=names[0])
    return found[0], body[found[0]]


def several(value: Any, kind: type | tuple[type, ...], name: str) -> list[Any]:
    """A value or a list of them, as a list."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, kind) for one in values):
        raise HttpError(400, f"{name!r} holds something that it cannot hold, or nothing", param=name)
    if len(values) > MOST_SAMPLES:
        raise HttpError(413, f"{name!r} has {len(values)} samples: send at most {MOST_SAMPLES} at once", param=name)
    return values


def numbers(value: Any, name: str, dtype: str = "float32") -> NDArray[Any]:
    """Nested lists of finite numbers as an array."""
    try:
        given = np.asarray(value)
        if given.dtype.kind not in "biuf":
            raise ValueError("not only numbers")
        if not given.size:
            raise HttpError(400, f"{name!r} holds no number", param=name)
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            made = given.astype(dtype)
    except (ValueError, TypeError, OverflowError):
        raise HttpError(400, f"{name!r} must be numbers in nested lists of equal lengths", param=name) from None
    return finite(made, name)


def finite(values: NDArray[Any], name: str) -> NDArray[Any]:
    if dtype_name(values) is None:
        raise HttpError(400, f"{name!r} has the dtype {values.dtype.name}: use one of {', '.join(DTYPES)}", param=name)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise HttpError(400, f"{name!r} holds NaN or infinity, or a number too large for float32", param=name)
    return values


def rows_of(arrays: Mapping[str, NDArray[Any]], most_rows: int) -> list[Inputs]:
    """Arrays whose dim 0 is the sample, cut into pieces that fit a batch."""
    if len(arrays) > MOST_ARRAYS:
        raise HttpError(400, f"{len(arrays)} arrays: send at most {MOST_ARRAYS}")
    sizes = {len(values) if values.ndim else 0 for values in arrays.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise HttpError(400, f"the arrays must have one number of samples, at least 1, got {sorted(sizes)}")
    rows = sizes.pop()
    if rows > MOST_SAMPLES:
        raise HttpError(413, f"{rows} samples: send at most {MOST_SAMPLES} at once")
    # Only tokens vary in length from one request to the next; who sends a mask has padded already.
    length = arrays["tokens"].shape[1] if set(arrays) <= {"tokens", "types"} and arrays["tokens"].ndim == 2 else 0
    return [
        Inputs(len(piece), length, {name: array(values[piece.start : piece.stop]) for name, values in arrays.items()})
        for piece in (range(at, min(at + most_rows, rows)) for at in range(0, rows, most_rows))
    ]


class Classes:
    """Reads "scores" [1, classes] as the likeliest label and all scores."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(map(str, labels))

    def prediction(self, sample: Any, outputs: Sequence[Outputs]) -> Any:
        scores = memoryview(outputs[0].arrays["scores"].data).cast("f").tolist()
        best = max(range(len(scores)), key=scores.__getitem__)
        labels = self.labels if len(self.labels) == len(scores) else tuple(map(str, range(len(scores))))
        return {"label": labels[best], "score": scores[best], "scores": dict(zip(labels, scores, strict=True))}
