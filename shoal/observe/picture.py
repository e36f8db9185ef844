"""Pictures of curves in SVG, for files: panels of one size in rows, a legend above them, a line of text below."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from shoal.errors import UserError
from shoal.observe import scale
from shoal.observe.curves import Series
from shoal.observe.scale import Scale
from shoal.observe.units import figure

# The geometry, in the picture's own units, and its colours: those of style.css on white.
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 470, 280, 62, 44, 28, 34
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#c98a00", "#3a9bd9", "#5e4b8b", "#6b6f76")


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str  # what the numbers are, beside the title
    lines: Mapping[str, Series]
    tick: Callable[[float], str]  # how a place on the x axis is written
    ticks: Sequence[float] = ()  # places on the x axis; (): steps of the values
    log: bool = False


def picture(rows: Sequence[Sequence[Panel]], about: str) -> str:
    """One SVG text. A line has one colour in all panels."""
    names = list(dict.fromkeys(name for row in rows for panel in row for name in panel.lines))
    keys = _legend(names)
    panels, top = [], 40
    for row in rows:
        for column, panel in enumerate(row):
            panels.append(f'<g transform="translate({column * WIDTH} {top})">{_panel(panel, names)}</g>')
        top += HEIGHT
    wide = WIDTH * max(map(len, rows), default=1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {top + 24}" width="{wide}" '
        f'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'{keys}{"".join(panels)}<text x="10" y="{top + 12}" fill="#5b6570">{escape(about)}</text></svg>\n'
    )


def write(text: str, file: Path) -> None:
    """Whole or not at all. Raises UserError."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write the plot {str(file)!r}: {error.strerror}.") from None


def _legend(names: Sequence[str]) -> str:
    out, x = [], 10.0
    for number, name in enumerate(names):
        out.append(
            f'<path d="M{x:.0f} 20h18" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="3"/>'
            f'<text x="{x + 24:.0f}" y="24">{escape(name)}</text>'
        )
        x += 44 + 7 * len(name)
    return "".join(out)


def _panel(panel: Panel, names: Sequence[str]) -> str:
    found = panel.lines
    across = scale.steps([x for points in found.values() for x in points.x])
    if panel.ticks:
        across = Scale(min(panel.ticks), max(panel.ticks), tuple(panel.ticks))
    values = [y for points in found.values() for y in points.y]
    up = (scale.logarithmic(values) if panel.log else None) or scale.linear(values, zero=True)
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + across.place(x) * wide, TOP + (1 - up.place(y)) * high

    out = [f'<text x="{LEFT}" y="{TOP - 14}"><tspan font-weight="600">{escape(panel.title)}</tspan>'
           f'<tspan fill="#5b6570" dx="8">{escape(panel.unit)}</tspan></text>']  # fmt: skip
    for tick in up.ticks:
        y = at(across.low, tick)[1]
        out.append(f'<path d="M{LEFT} {y:.1f}h{wide}" stroke="#e3e4e1"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#5b6570">{figure(tick, 3)}</text>')
    for tick in across.ticks:
        x = at(tick, up.low)[0]
        out.append(f'<text x="{x:.1f}" y="{TOP + high + 18}" text-anchor="middle" fill="#5b6570">'
                   f"{escape(panel.tick(tick))}</text>")  # fmt: skip
    for name, points in found.items():
        ink = COLOURS[names.index(name) % len(COLOURS)]
        places = [at(x, y) for x, y in zip(points.x, points.y, strict=True)]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        out.append(f'<path d="M{line}" fill="none" stroke="{ink}" stroke-width="2" stroke-linejoin="round"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{ink}"/>' for x, y in places]
    return "".join(out)
