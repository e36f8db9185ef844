"""Images: files or numbers to what the model was trained on, by the same table from pixel values to numbers."""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.serve.http.messages import HttpError
from shoal.serve.intake.task import Classes, field, numbers, several
from shoal.serve.payloads import Inputs, array

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM")
MOST_PIXELS = 16 << 20  # of a file's image, before it is scaled


class ImageClasses(Classes):
    """{"image": base64 of a file}, {"pixels": 0..255 nested [C, H, W] or [H, W]} or {"input": the model's numbers}."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__(facts.get("labels", ()))
        self.shape: tuple[int, ...] = tuple(facts["shape"])
        table = facts.get("pixels")
        self._table = None if table is None else np.array(table, np.float32)  # [C, 256]
        nested = {"type": "array", "description": f"numbers, nested as {list(self.shape)}, or a list of these"}
        self.fields: Mapping[str, Any] = {"input": nested}
        self.example: Mapping[str, Any] = {"input": np.zeros(self.shape).tolist()}
        if self._table is not None:
            pixels = {**nested, "description": f"pixel values 0 to 255, nested as {list(self.shape)}"}
            image = {"type": "string", "contentEncoding": "base64", "description": f"a file: {', '.join(FORMATS)}"}
            self.fields = {"image": image, "pixels": pixels, "input": nested}
        self.alternatives: tuple[tuple[str, ...], ...] = tuple((name,) for name in self.fields)

    def read(self, body: Mapping[str, Any]) -> list[Any]:
        name, value = field(body, tuple(self.fields))
        if name == "image":
            return [self._normalised(self._decoded(one)) for one in several(value, str, name)]
        made = numbers(value, name)
        if made.ndim == len(self.shape) - 1 and self.shape[0] == 1:  # grey, without its channel
            made = made[None]
        made = made if made.ndim > len(self.shape) else made[None]
        if made.shape[1:] != self.shape:
            raise HttpError(400, f"{name!r} has the shape {list(made.shape)}, the model takes {list(self.shape)}")
        samples = several(list(made), np.ndarray, name)
        return [self._normalised(one) for one in samples] if name == "pixels" else samples

    def _normalised(self, image: NDArray[Any]) -> NDArray[Any]:
        assert self._table is not None
        if image.min() < 0 or image.max() > 255:
            raise HttpError(400, "pixel values must be from 0 to 255", param="pixels")
        whole = image.astype(np.uint8)
        return np.stack([table[channel] for table, channel in zip(self._table, whole, strict=True)])

    def _decoded(self, text: str) -> NDArray[Any]:
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise HttpError(
                501, "reading image files needs pillow on the server: pip install 'shoal[images]'"
            ) from None
        channels, height, width = self.shape
        try:
            raw = base64.b64decode(text.rpartition(",")[2], validate=True)  # a data URL's head goes before a comma
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise HttpError(
                        413, f"an image of {image.width} x {image.height}: send at most {MOST_PIXELS} pixels"
                    )
                fitted = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (width, height))
        except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise HttpError(
                400, f"'image' must be the base64 of a whole {', '.join(FORMATS)} file", param="image"
            ) from None
        return np.asarray(fitted, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)

    def inputs(self, sample: Any) -> list[Inputs]:
        return [Inputs(1, 0, {"input": array(sample[None])})]


class NumberClasses(Classes):
    """Rows of a table: {"rows": {column: number}} in the table's own units, or {"input": the model's numbers}."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__(facts.get("labels", ()))
        self._columns: list[str] = list(facts.get("columns", ()))
        self._shift = np.array(facts.get("shift", 0.0))
        self._scale = np.array(facts.get("scale", 1.0))
        self.fields: Mapping[str, Any] = {"input": {"type": "array", "items": {"type": "number"}}}
        self.example: Mapping[str, Any] = {"input": [0.0] * max(1, len(self._columns))}
        if self._columns:
            row = {"type": "object", "required": self._columns}
            self.fields = {"rows": {"oneOf": [row, {"type": "array", "items": row}]}, **self.fields}
            self.example = {"rows": dict.fromkeys(self._columns, 0.0)}
        self.alternatives: tuple[tuple[str, ...], ...] = tuple((name,) for name in self.fields)

    def read(self, body: Mapping[str, Any]) -> list[Any]:
        name, value = field(body, tuple(self.fields))
        if name == "rows":
            rows = several(value, dict, name)
            for row in rows:
                lacking = [column for column in self._columns if column not in row]
                if lacking:
                    raise HttpError(400, f"a row lacks {lacking[0]!r}", param=name)
            given = numbers([[row[column] for column in self._columns] for row in rows], name, "float64")
            made = ((given - self._shift) / self._scale).astype(np.float32)
        else:
            made = numbers(value, name)
            made = made if made.ndim > 1 else made[None]
        if made.ndim != 2 or (self._columns and made.shape[1] != len(self._columns)):
            raise HttpError(400, f"{name!r} has the shape {list(made.shape)}, not [samples, {len(self._columns)}]")
        return several(list(made), np.ndarray, name)

    def inputs(self, sample: Any) -> list[Inputs]:
        return [Inputs(1, 0, {"input": array(sample[None])})]
