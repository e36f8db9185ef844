"""What `shoal bench collectives` measured, as curves over the size: a page of its own, or a picture."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from shoal.observe import picture as drawing
from shoal.observe.curves import Series
from shoal.observe.figures import colour
from shoal.observe.page import document
from shoal.observe.picture import Panel
from shoal.observe.svg import Chart, Line, line_chart
from shoal.observe.units import binary_size

Result = Mapping[str, Any]  # what shoal.comm.measuring.sweep gives, or its JSON
Row = Mapping[str, Any]


@dataclass(frozen=True)
class View:
    """One way to look at a cell: a chart of it."""

    title: str
    unit: str
    value: Callable[[Row], float | None]
    log: bool = False


VIEWS = (
    View("Time", "µs, median of the slowest rank", lambda row: row["latency_s"] * 1e6, log=True),
    View("Bus bandwidth", "GB/s", lambda row: _scaled(row["bus_bytes_per_s"], 1e-9)),
    View("Of memcpy", "share of the speed of a copy of as many bytes", lambda row: row["memcpy_share"]),
    View("CPU time", "µs of all ranks, an operation", lambda row: row["cpu_s"] * 1e6, log=True),
)


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def write(result: Result, file: Path) -> None:
    """A page where ``file`` ends in .html, else a picture in SVG. Written whole or not at all. Raises UserError."""
    text = page(result, time.time()) if file.suffix == ".html" else picture(result)
    drawing.write(text, file)


def named(row: Row) -> str:
    """Who carried out a row's collective."""
    parts = [row["transport"], *([row["algorithm"]] if row["algorithm"] != "native" else [])]
    return " ".join([*parts, *(["zero-copy"] if row["zero_copy"] else [])])


def groups(result: Result) -> dict[str, list[Row]]:
    """The rows of each operation and dtype that moves bytes, under its title."""
    out: dict[str, list[Row]] = {}
    for row in result["rows"]:
        if row["bytes"]:
            out.setdefault(f"{row['op']} {row['dtype']}", []).append(row)
    return out


def series(rows: Sequence[Row], view: View) -> dict[str, Series]:
    """Each arm's curve: x is the binary logarithm of bytes."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = view.value(row)
        if value is not None:
            points.setdefault(named(row), []).append((math.log2(row["bytes"]), value))
    return {name: Series(*map(tuple, zip(*sorted(found), strict=True))) for name, found in points.items()}


def about(result: Result) -> str:
    machine = result["machine"]
    return (
        f"{result['settings']['workers']} ranks on {machine['cores']} cores ({machine['processor']}), torch "
        f"{machine['torch']}, load {machine['load_average']:.1f}; all arms took turns in the same processes"
    )


def page(result: Result, now: float) -> str:
    """One HTML text. ``now``: Unix seconds, for its foot."""
    folder = resources.files("shoal.observe")
    body = f'<header><h1>Collectives</h1><p class="verdict">{escape(about(result))}.</p></header>'
    for title, rows in groups(result).items():
        charts = "".join(
            line_chart(
                Chart(
                    view.title,
                    view.unit,
                    [Line(name, colour(i), points, dots=True) for i, (name, points) in enumerate(found.items())],
                    x_name="size",
                    zero=True,
                    log_first=view.log,
                )
            )
            for view in VIEWS
            for found in [series(rows, view)]
        )
        body += f'<section><h2>{escape(title)}</h2><div class="charts">{charts}</div></section>'
    return document(
        "Collectives · Shoal bench",
        body,
        (folder / "style.css").read_text(encoding="utf-8"),
        (folder / "page.js").read_text(encoding="utf-8"),
        now,
    )


def picture(result: Result) -> str:
    """One SVG text: a row of panels for each operation and dtype, time and bus bandwidth."""
    rows = [
        [
            Panel(title, f"{view.title}, {view.unit}", series(found, view), lambda x: binary_size(2**x), log=view.log)
            for view in VIEWS[:2]
        ]
        for title, found in groups(result).items()
    ]
    return drawing.picture(rows, about(result))
