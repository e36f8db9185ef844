"""Tables as named columns: CSV, JSON lines and Parquet."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UserError

Columns = Mapping[str, NDArray[Any]]  # int64, float64 (NaN: no value), or objects (text; None: no value); all [rows]


def read_columns(path: str, kind: str, separator: str = ",") -> Columns:
    """The columns of a file, or of all files of that kind in a folder, one below the other in the order of their names.

    ``kind`` is "csv" (the first line names the columns), "jsonl" or "parquet". Raises UserError naming the file, and
    the line where there is one, that cannot be read."""
    root = Path(path).expanduser()
    files = sorted(root.glob(f"*.{kind}")) if root.is_dir() else [root]
    if not files or not files[0].is_file():
        raise UserError(f"data: no {kind} file at {path!r}: check data.path.")
    read: dict[str, Callable[[Path], dict[str, Sequence[Any]]]] = {
        "csv": lambda file: _read_csv(file, separator),
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
    }
    columns: dict[str, list[Any]] = {}
    for number, file in enumerate(files):
        try:
            part = read[kind](file)
        except UnicodeDecodeError as error:
            raise UserError(f"{str(file)!r} is not UTF-8 text: {error}.") from None
        except OSError as error:
            raise UserError(f"cannot read {str(file)!r}: {error.strerror or error}.") from None
        if number and set(part) != set(columns):
            raise UserError(f"{str(file)!r} has other columns than {str(files[0])!r}: {', '.join(part)}.")
        for name, values in part.items():
            columns.setdefault(name, []).extend(values)
    if not columns or not len(next(iter(columns.values()))):
        raise UserError(f"data: {path!r} holds no rows.")
    return {name: _typed(values, from_text=kind == "csv") for name, values in columns.items()}


def _read_csv(path: Path, separator: str) -> dict[str, Sequence[Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = next(rows, [])
            if len(set(names)) < len(names):
                raise UserError(f"{str(path)!r}, line 1: a column name occurs twice: {separator.join(names)[:80]}.")
            body = []
            for row in rows:
                if len(row) != len(names) and row:
                    raise UserError(
                        f"{str(path)!r}, line {rows.line_num}: {len(row)} values for {len(names)} columns: "
                        f"mend the line, or set separator."
                    )
                if row:
                    body.append(row)
        except csv.Error as error:
            raise UserError(f"{str(path)!r}, line {rows.line_num}: {error}.") from None
    return dict(zip(names, zip(*body, strict=True), strict=True)) if body else {}


def _read_jsonl(path: Path) -> dict[str, Sequence[Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{str(path)!r}, line {number}: not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise UserError(f"{str(path)!r}, line {number}: must be a JSON object, is {line.strip()[:40]}.")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> dict[str, Sequence[Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading Parquet needs pyarrow: pip install 'shoal[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{str(path)!r} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _typed(values: Sequence[Any], from_text: bool) -> NDArray[Any]:
    """The narrowest of int64, float64 and objects that holds the values."""
    given = [None if value == "" and from_text else value for value in values]
    whole = str if from_text else int  # true and false count as 1 and 0
    try:
        present = [value for value in given if isinstance(value, whole)]
        if len(present) == len(given):
            return np.array([int(value) for value in present], np.int64)
    except (ValueError, OverflowError):
        pass
    numbers = (str,) if from_text else (int, float)
    try:
        if all(value is None or isinstance(value, numbers) for value in given):
            return np.array([np.nan if value is None else float(value) for value in given], np.float64)
    except ValueError:
        pass
    objects = np.empty(len(given), object)
    objects[:] = given
    return objects
