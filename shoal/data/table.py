"""Rows of a table to learn from: numbers, or text with a label."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.columns import Columns, read_columns
from shoal.data.config import SourceConfig, at_least, read_config
from shoal.data.ledger import Ids
from shoal.data.source import Batch, Splits
from shoal.data.special import special_tokens
from shoal.data.split import random_parts
from shoal.data.tokenizer import Tokenizer, open_tokenizer
from shoal.errors import UserError, unknown_name
from shoal.recipe.recipe import DataSpec


@dataclass(frozen=True, kw_only=True)
class TableConfig(SourceConfig):
    target: str = "target"  # the column to predict
    predict: Literal["auto", "class", "number"] = "auto"  # auto: a class where the target is text or whole numbers
    features: tuple[str, ...] = ()  # the columns to predict it from; (): all others that hold numbers
    standardise: bool = True  # features to mean 0 and deviation 1, by the training rows
    missing: Literal["refuse", "mean"] = "refuse"  # what becomes of a feature without a value
    separator: str = ","  # between the values of a CSV line
    text: str = ""  # instead of features: the column of text to predict the target from
    tokenizer: str = "bytes"  # for text: "bytes", or the path of a tokenizer.json
    context: int = 128  # for text: tokens of a sample, longer text is cut

    def __post_init__(self) -> None:
        at_least(3, context=self.context)
        if len(self.separator) != 1:
            raise UserError(f"data: separator must be one character, got {self.separator!r}.")
        if self.text and self.features:
            raise UserError("data: give text (one column of text) or features (columns of numbers), not both.")


@dataclass(frozen=True)
class RowSource:
    """Rows held in memory: each name's array [rows, ...] becomes the tensor of that name."""

    arrays: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.arrays["target"])

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(b"rows")
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def fetch(self, ids: Ids, epoch: int) -> Batch:
        wide = {np.dtype(np.int32): np.int64}  # tokens are kept narrow
        rows = {name: array[ids] for name, array in self.arrays.items()}
        return {name: torch.from_numpy(a.astype(wide.get(a.dtype, a.dtype), copy=False)) for name, a in rows.items()}


@dataclass(frozen=True)
class Target:
    """How a target column becomes numbers: the index of its label, or itself where there are no labels."""

    column: str
    labels: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        return {"classes": len(self.labels), "labels": list(self.labels)} if self.labels else {"outputs": 1}

    def read(self, columns: Columns, where: str) -> NDArray[Any]:
        """int64 classes [rows], or float32 [rows, 1]. Raises UserError naming a row whose target cannot be used."""
        values = _column(columns, self.column, where)
        if not self.labels:
            return _finite(values, self.column, where).astype(np.float32)[:, None]
        index = {label: number for number, label in enumerate(self.labels)}
        words = [_label(value) for value in values.tolist()]
        for row, word in enumerate(words):
            if word is None:
                raise UserError(f"{where}: row {row + 1} has no value in the target column {self.column!r}.")
            if word not in index:
                raise unknown_name("class", word, index, f"row {row + 1} of {where}")
        return np.array([index[str(word)] for word in words], np.int64)


class Reader(Protocol):
    """Turns the columns of a file into what a model sees, in the same way for every file."""

    def facts(self) -> dict[str, Any]: ...

    def read(self, columns: Columns, where: str) -> dict[str, NDArray[Any]]: ...


@dataclass(frozen=True)
class NumberReader:
    """{"input": float32 [rows, features]}: (value - shift) / scale, with ``fill`` where there is no value."""

    names: tuple[str, ...]
    refuse_missing: bool
    fill: NDArray[np.float64]  # [features], as the two below
    shift: NDArray[np.float64]
    scale: NDArray[np.float64]

    def facts(self) -> dict[str, Any]:
        numbers = {"shift": self.shift.tolist(), "scale": self.scale.tolist()}
        return {"features": len(self.names), "columns": list(self.names), **numbers}

    def read(self, columns: Columns, where: str) -> dict[str, NDArray[Any]]:
        features = _features(columns, self.names, where)
        if self.refuse_missing:
            for index, name in enumerate(self.names):
                _finite(features[:, index], name, where, "; or set missing = 'mean'")
        features = np.where(np.isfinite(features), features, self.fill)
        return {"input": ((features - self.shift) / self.scale).astype(np.float32)}


@dataclass(frozen=True)
class TextReader:
    """{"tokens": int32, "mask": bool}, both [rows, context]: a start token, the text, a separator, padding."""

    column: str
    tokenizer: Tokenizer
    context: int

    def facts(self) -> dict[str, Any]:
        return special_tokens(self.tokenizer).facts(self.tokenizer, self.context)

    def read(self, columns: Columns, where: str) -> dict[str, NDArray[Any]]:
        special = special_tokens(self.tokenizer)
        texts = _column(columns, self.column, where)
        tokens = np.full((len(texts), self.context), special.pad, np.int32)
        mask = np.zeros(tokens.shape, np.bool_)
        for row, text in enumerate(texts.tolist()):
            if text is None:
                raise UserError(f"{where}: row {row + 1} has no text in column {self.column!r}.")
            ids = special.framed(self.tokenizer.encode(str(text)), self.context)
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return {"tokens": tokens, "mask": mask}


def open_table(spec: DataSpec, seed: int) -> Splits:
    """The rows of a CSV, JSON lines or Parquet file (or a folder of them), some held out at random.

    {"input": float32 [n, features]} or, for text, {"tokens": int64 [n, context], "mask": bool [n, context]}; and
    {"target": int64 [n]} for classes or {"target": float32 [n, 1]} for numbers.
    Raises UserError naming file, row and column of what cannot be used."""
    config = read_config(TableConfig, spec)
    columns = read_columns(spec.path, spec.source, config.separator)
    target = _target(config, columns, spec.path)
    targets = target.read(columns, spec.path)
    parts = random_parts(len(targets), spec.validation, spec.test, seed)
    reader = _reader(config, columns, parts.train, spec.path)
    facts = {**reader.facts(), **target.facts()}
    splits = parts.splits(RowSource({**reader.read(columns, spec.path), "target": targets}, facts))
    if spec.test_path:
        apart = read_columns(spec.test_path, spec.source, config.separator)
        rows = {**reader.read(apart, spec.test_path), "target": target.read(apart, spec.test_path)}
        splits = replace(splits, test=RowSource(rows, facts))
    return splits


def _target(config: TableConfig, columns: Columns, where: str) -> Target:
    values = _column(columns, config.target, where)
    if config.predict == "number" or (config.predict == "auto" and values.dtype == np.float64):
        return Target(config.target, ())
    known = {value for value in values.tolist() if _label(value) is not None}
    ordered = sorted(known, key=lambda value: (isinstance(value, str), value if np.isscalar(value) else str(value)))
    return Target(config.target, tuple(dict.fromkeys(str(_label(value)) for value in ordered)))


def _reader(config: TableConfig, columns: Columns, train: Ids, where: str) -> Reader:
    if config.text:
        return TextReader(config.text, open_tokenizer(config.tokenizer), config.context)
    names = config.features or tuple(
        name for name, values in columns.items() if name != config.target and values.dtype != object
    )
    if not names:
        raise UserError(
            f"{where}: no column of numbers beside {config.target!r}: name a column of text with text = ..."
        )
    features = _features(columns, names, where)[train]
    known = np.isfinite(features)
    counts = np.maximum(known.sum(0), 1)
    mean = np.where(known, features, 0.0).sum(0) / counts
    std = np.sqrt(np.where(known, (features - mean) ** 2, 0.0).sum(0) / counts)
    shift, scale = (mean, np.where(std > 0, std, 1.0)) if config.standardise else (0 * mean, 0 * mean + 1)
    return NumberReader(names, config.missing == "refuse", mean, shift, scale)


def _column(columns: Columns, name: str, where: str) -> NDArray[Any]:
    if name not in columns:
        raise unknown_name("column", name, columns, where)
    return columns[name]


def _features(columns: Columns, names: tuple[str, ...], where: str) -> NDArray[np.float64]:
    """[rows, features]"""
    chosen = [_column(columns, name, where) for name in names]
    for name, values in zip(names, chosen, strict=True):
        if values.dtype == object:
            raise UserError(
                f"{where}: column {name!r} holds {next(v for v in values if v is not None)!r}, not numbers."
            )
    return np.stack([values.astype(np.float64) for values in chosen], axis=1)


def _finite(values: NDArray[Any], name: str, where: str, hint: str = "") -> NDArray[np.float64]:
    if values.dtype == object:
        raise UserError(f"{where}: column {name!r} holds text: set predict = 'class', or name another target.")
    lacking = ~np.isfinite(values.astype(np.float64))
    if lacking.any():
        raise UserError(f"{where}: row {int(lacking.argmax()) + 1} has no number in column {name!r}: mend it{hint}.")
    return values.astype(np.float64)


def _label(value: Any) -> str | None:
    """The name of a class; None for no value. A whole number that was read as a float is written as one."""
    if value is None or value != value:  # NaN
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
