"""What `shoal bench collectives` measured, as curves over the size: a page of its own, or a picture."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.observe import scale
from shoal.observe.curves import Series
from shoal.observe.figures import colour
from shoal.observe.page import document
from shoal.observe.svg import Chart, Line, line_chart
from shoal.observe.units import binary_size, figure

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
# The picture's geometry, in its own units, and its colours: those of style.css on white.
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 470, 280, 62, 44, 28, 34
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#c98a00", "#3a9bd9", "#5e4b8b", "#6b6f76")


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def write(result: Result, file: Path) -> None:
    """A page where ``file`` ends in .html, else a picture in SVG. Written whole or not at all. Raises UserError."""
    text = page(result, time.time()) if file.suffix == ".html" else picture(result)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write the plot {str(file)!r}: {error.strerror}.") from None


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
    found = groups(result)
    names = list(dict.fromkeys(named(row) for rows in found.values() for row in rows))
    keys = _legend(names)
    panels, top = [], 40
    for title, rows in found.items():
        for column, view in enumerate(VIEWS[:2]):
            panels.append(f'<g transform="translate({column * WIDTH} {top})">{_panel(title, rows, view, names)}</g>')
        top += HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {top + 24}" width="{2 * WIDTH}" '
        f'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'{keys}{"".join(panels)}<text x="10" y="{top + 12}" fill="#5b6570">{escape(about(result))}</text></svg>\n'
    )


def _legend(names: Sequence[str]) -> str:
    out, x = [], 10.0
    for number, name in enumerate(names):
        out.append(
            f'<path d="M{x:.0f} 20h18" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="3"/>'
            f'<text x="{x + 24:.0f}" y="24">{escape(name)}</text>'
        )
        x += 44 + 7 * len(name)
    return "".join(out)


def _panel(title: str, rows: Sequence[Row], view: View, names: Sequence[str]) -> str:
    found = series(rows, view)
    across = scale.steps([x for points in found.values() for x in points.x])
    values = [y for points in found.values() for y in points.y]
    up = (scale.logarithmic(values) if view.log else None) or scale.linear(values, zero=True)
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + across.place(x) * wide, TOP + (1 - up.place(y)) * high

    out = [f'<text x="{LEFT}" y="{TOP - 14}"><tspan font-weight="600">{escape(title)}</tspan>'
           f'<tspan fill="#5b6570" dx="8">{escape(view.title)}, {escape(view.unit)}</tspan></text>']  # fmt: skip
    for tick in up.ticks:
        y = at(across.low, tick)[1]
        out.append(f'<path d="M{LEFT} {y:.1f}h{wide}" stroke="#e3e4e1"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#5b6570">{figure(tick, 3)}</text>')
    for tick in across.ticks:
        x = at(tick, up.low)[0]
        out.append(f'<text x="{x:.1f}" y="{TOP + high + 18}" text-anchor="middle" fill="#5b6570">'
                   f"{binary_size(2**tick)}</text>")  # fmt: skip
    for name, points in found.items():
        ink = COLOURS[names.index(name) % len(COLOURS)]
        places = [at(x, y) for x, y in zip(points.x, points.y, strict=True)]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        out.append(f'<path d="M{line}" fill="none" stroke="{ink}" stroke-width="2" stroke-linejoin="round"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{ink}"/>' for x, y in places]
    return "".join(out)
