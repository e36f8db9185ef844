"""What verbs print: JSON lines, tables, numbers with units."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def json_line(value: Any) -> str:
    """One line of strict JSON: numbers that JSON does not have (NaN) become text, paths too."""
    return json.dumps(_strict(value), default=str)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def event_line(event: Mapping[str, Any]) -> None:
    """An event as one JSON line on stderr: what every verb does with its progress under --json."""
    print(json_line(event), file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned to the left, two spaces apart."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def count(number: float) -> str:
    """1234567 -> "1.2M"."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if suffix == 'k' else size):.1f}{suffix}"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """75 -> "1:15"; 3700 -> "1:01:40"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def about_size(nbytes: int) -> str:
    """1048572 -> "1 MiB": where blocks of equal size do not make a round number, it is near enough."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit * 0.999:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} B"


def interval(seconds: float) -> str:
    """0.0000123 -> "12.3 us"; 0.25 -> "250 ms"."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit or unit == 1e-6:
            number = seconds / unit
            return f"{number:.0f} {name}" if number >= 100 else f"{number:.3g} {name}"
    return f"{seconds:g} s"
