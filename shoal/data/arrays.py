"""Arrays from NumPy and safetensors files, mapped into memory where the format allows it."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.config import SourceConfig, read_config
from shoal.data.ledger import Ids
from shoal.data.source import Batch, Splits
from shoal.data.split import random_parts
from shoal.errors import UserError, unknown_name
from shoal.recipe.recipe import DataSpec

SAFETENSORS_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?", "U8": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
}  # fmt: skip
HEADER_BYTES = 100 << 20  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class ArraysConfig(SourceConfig):
    input: str = ""  # the array of samples; "": "input" where there is one, else the first
    target: str = ""  # the array of targets; "": "target" where there is one, else the second, if any


@dataclass(frozen=True)
class ArraySource:
    """{"input": [n, ...], "target": [n, ...]}: fractions become float32, whole numbers int64.

    Input of 8-bit whole numbers is taken for pixels: it becomes float32 between 0 and 1."""

    input: NDArray[Any]
    target: NDArray[Any] | None
    classes: int  # of whole-number targets [samples]; else 0

    def __len__(self) -> int:
        return len(self.input)

    @property
    def facts(self) -> Mapping[str, Any]:
        sample = self.input.shape[1:]
        facts: dict[str, Any] = {"shape": sample} if len(sample) > 1 else {"features": sample[0] if sample else 1}
        if self.classes:
            return {**facts, "classes": self.classes, "labels": [str(label) for label in range(self.classes)]}
        if self.target is not None:
            facts["outputs"] = int(np.prod(self.target.shape[1:], dtype=np.int64))
        return facts

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(b"arrays")
        for array in (self.input, self.target):
            if array is not None:
                digest.update(f"{array.dtype} {array.shape}".encode())
                for start in range(0, len(array), 1024):
                    digest.update(np.ascontiguousarray(array[start : start + 1024]).data.cast("B"))
        return digest.hexdigest()

    def fetch(self, ids: Ids, epoch: int) -> Batch:
        batch = {"input": _tensor(self.input[ids], pixels=True)}
        return batch if self.target is None else {**batch, "target": _tensor(self.target[ids], pixels=False)}


def _tensor(rows: NDArray[Any], pixels: bool) -> torch.Tensor:
    if pixels and rows.dtype == np.uint8:
        return torch.from_numpy(rows.astype(np.float32) / np.float32(255))
    return torch.from_numpy(rows.astype(np.float32 if rows.dtype.kind == "f" else np.int64))


def open_arrays(spec: DataSpec, seed: int) -> Splits:
    """The arrays of one .npy, .npz or .safetensors file, or of a folder of .npy files named for what they hold; some
    samples held out at random.

    Raises UserError naming the file or the array that cannot be used."""
    config = read_config(ArraysConfig, spec)
    source = _source(read_arrays(spec.path), config, spec.path)
    splits = random_parts(len(source), spec.validation, spec.test, seed).splits(source)
    if spec.test_path:
        test = _source(read_arrays(spec.test_path), config, spec.test_path)
        if test.input.shape[1:] != source.input.shape[1:] or test.classes > source.classes:
            raise UserError(f"data: {spec.test_path!r} has other shapes or more classes than {spec.path!r}.")
        splits = replace(splits, test=replace(test, classes=source.classes))
    return splits


def _source(arrays: Mapping[str, NDArray[Any]], config: ArraysConfig, where: str) -> ArraySource:
    for name in (config.input, config.target):
        if name and name not in arrays:
            raise unknown_name("array", name, arrays, where)
    rest = [name for name in arrays if name not in (config.input, config.target)]
    first = config.input or ("input" if "input" in rest else next((name for name in rest if name != "target"), ""))
    if not first:
        raise UserError(f"data: no array to take the input from in {where!r}: name it with input = ...")
    others = [name for name in rest if name != first]
    second = config.target or ("target" if "target" in others else next(iter(others), ""))
    data, target = arrays[first], arrays[second] if second else None
    for name in filter(None, (first, second)):
        if arrays[name].dtype.kind not in "fiub" or not arrays[name].ndim or not arrays[name].size:
            raise UserError(
                f"{where}: array {name!r} is {arrays[name].dtype} {arrays[name].shape}, not a set of samples."
            )
    if target is not None and len(target) != len(data):
        raise UserError(f"{where}: {len(data)} samples in {first!r}, but {len(target)} targets in {second!r}.")
    classes = 0
    if target is not None and target.ndim == 1 and target.dtype.kind in "iub":
        if int(target.min()) < 0:
            raise UserError(f"{where}: array {second!r} holds {int(target.min())}: classes are numbered from 0.")
        classes = int(target.max()) + 1
    return ArraySource(data, target, classes)


def read_arrays(path: str) -> dict[str, NDArray[Any]]:
    """Arrays by name, in the file's order; .npy and .safetensors are memory-mapped, .npz is read. Nothing is unpickled.

    Raises UserError when the file is missing, damaged, or of another kind."""
    place = Path(path).expanduser()
    files = sorted(place.glob("*.npy")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise UserError(f"data: no .npy, .npz or .safetensors file at {path!r}: check data.path.")
    try:
        match files[0].suffix:
            case ".npy":
                return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in files}
            case ".npz":
                with place.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                    return dict(archive)
            case ".safetensors":
                return _map_safetensors(place)
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path!r} cannot be read as arrays: {' '.join(str(error).split())}.") from None
    raise UserError(f"data: {path!r} is none of .npy, .npz and .safetensors.")


def _map_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """The format's own reader copies whole tensors; samples are wanted row by row. Layout: 8 bytes with the header's
    length, the header in JSON, then the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, HEADER_BYTES):
            raise ValueError("not a whole safetensors file")
        header = json.loads(file.read(length))
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise ValueError(f"tensor {name!r} is of type {entry['dtype']}, which NumPy lacks: save it as F32")
        dtype, shape = np.dtype(SAFETENSORS_TYPES[entry["dtype"]]), tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if end - start != dtype.itemsize * int(np.prod(shape, dtype=np.int64)) or 8 + length + end > size:
            raise ValueError(f"tensor {name!r} is cut short")
        arrays[name] = np.memmap(path, dtype, "r", 8 + length + start, shape) if end > start else np.empty(shape, dtype)
    return arrays
