"""Charts as HTML: SVG for what is drawn, text beside it, so that letters keep their size at any width.

Pure functions from values to text. Each SVG has a box of 1000 x 1000 that is stretched over the plot; strokes do not
stretch with it. All text that comes in is escaped here. The scripts of page.js read the numbers from the JSON in each
figure; without them, the figures stand as they are.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from shoal.observe import scale
from shoal.observe.curves import Series
from shoal.observe.scale import Scale
from shoal.observe.thinning import averaged, running_mean, thin
from shoal.observe.units import amount, binary_size, duration, figure

FORMATS: dict[str, Callable[[float], str]] = {
    "figure": figure,
    "amount": amount,
    "seconds": duration,
    "share": lambda value: f"{value * 100:g} %",
}
COLUMNS = 160  # of a stacked chart
MEAN_POINTS = 400  # of a smoothed line
FEW_LINES = 4  # of more, the noise around the smoothed lines would cover all of them: it is drawn on request only


@dataclass(frozen=True)
class Line:
    name: str
    colour: str  # a class of style.css that sets --colour, such as "c0" or "part-data"
    series: Series
    smooth: bool = False  # draw a running mean over it
    dots: bool = False  # mark each point: for figures that were measured now and then
    dashed: bool = False
    group: str = ""  # lines of one group share an entry of the legend; "" is a group of its own


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str  # what the numbers are, beside the title
    lines: Sequence[Line]
    form: str = "figure"  # how numbers are written: a key of FORMATS
    x_name: str = "step"  # or "time" (x in seconds) or "size" (x is the binary logarithm of bytes)
    zero: bool = False  # the axis starts at 0
    log_first: bool = False
    marks: Sequence[tuple[float, str]] = ()  # (x, text) of vertical lines: resumes, stops
    note: str = ""
    wide: bool = False


def line_chart(chart: Chart) -> str:
    """A figure of lines over steps (or seconds); "" when no line has a point."""
    lines = [line for line in chart.lines if len(line.series)]
    if not lines:
        return ""
    values = [y for line in lines for y in line.series.y]
    across, below = _across(chart, [x for line in lines for x in line.series.x])
    plain = scale.linear(values, zero=chart.zero)
    # Rates and shares are read against zero, which a log scale does not have.
    logged = scale.logarithmic(values) if chart.form == "figure" and not any(y < 0 for y in values) else None
    keys = {line.group or line.name: line for line in reversed(lines)}  # the first line of a group stands for it
    groups = list(reversed(keys))
    log_first = chart.log_first and logged is not None
    plots = _plot(chart, lines, groups, across, below, plain, shown=not log_first)
    if logged:
        plots += _plot(chart, lines, groups, across, below, logged, shown=log_first)
    tools = ""
    smoothed = any(line.smooth and len(line.series) > 10 for line in lines)
    if smoothed:
        tools += '<button type="button" class="tool" data-tool="smooth" aria-pressed="true">smooth</button>'
    if logged:
        tools += f'<button type="button" class="tool" data-tool="log" aria-pressed="{_yes(log_first)}">log</button>'
    data = {
        "form": chart.form,
        "xName": chart.x_name,
        "x": [across.low, across.high],
        "linear": [plain.low, plain.high],
        "log": [logged.low, logged.high] if logged else None,
        "series": [
            {
                "name": line.name,
                "group": groups.index(line.group or line.name),
                "colour": line.colour,
                **_numbers(thin(line.series)),
            }
            for line in lines
        ],
    }
    classes = ("smoothed" if smoothed else "") + (" many" if len(lines) > FEW_LINES else "")
    entries = [(name, f"{keys[name].colour}{' dashed' if keys[name].dashed else ''}", "line") for name in groups]
    return _figure(chart, plots, tools, entries, data, classes)


def stacked_chart(chart: Chart) -> str:
    """A figure of stacked columns, each the mean over its steps; "" without steps. All lines hold the same steps."""
    lines = [line for line in chart.lines if len(line.series)]
    if not lines:
        return ""
    edges, below = _across(chart, lines[0].series.x)
    columns = [averaged(line.series, COLUMNS) for line in lines]
    starts = [*columns[0].x, lines[0].series.x[-1] + 1]
    across = Scale(starts[0], starts[-1], edges.ticks)
    totals = [sum(heights) for heights in zip(*(column.y for column in columns), strict=True)]
    usual = sorted(totals)[int(0.95 * (len(totals) - 1))]
    cut = max(totals) > 2.5 * usual  # a few slow steps would press all others flat
    up = scale.linear([0.0, usual * 1.25 if cut else max(totals)], zero=True)
    shapes = []
    base = [0.0] * len(totals)
    for number, (line, column) in enumerate(zip(lines, columns, strict=True)):
        top = [b + y for b, y in zip(base, column.y, strict=True)]
        if any(column.y):
            shapes.append(
                f'<path class="band {line.colour}" data-series="{number}" d="{_band(starts, base, top, across, up)}"/>'
            )
        base = top
    note = chart.note
    if cut:
        note += f" Columns higher than {FORMATS[chart.form](up.high)} are cut; the highest is {duration(max(totals))}."
    data = {
        "form": chart.form,
        "xName": chart.x_name,
        "x": [across.low, across.high],
        "stacked": True,
        "series": [
            {"name": line.name, "group": number, "colour": line.colour, **_numbers(column)}
            for number, (line, column) in enumerate(zip(lines, columns, strict=True))
        ],
    }
    plot = _frame(chart, across, below, up, "".join(shapes), shown=True)
    keys = [(line.name, line.colour, "block") for line in lines]
    return _figure(chart, plot, "", keys, data, "stacked", note)


def legend(keys: Iterable[tuple[str, str, str]]) -> str:
    """(name, colour class, "line" or "block") of each series; a button each, which the scripts make work."""
    items = "".join(
        f'<li><button type="button" class="key {shape} {colour}" data-series="{number}" aria-pressed="true">'
        f"<i></i>{escape(name)}</button></li>"
        for number, (name, colour, shape) in enumerate(keys)
    )
    return f'<ul class="legend">{items}</ul>'


def _yes(value: bool) -> str:
    return "true" if value else "false"


def _figure(
    chart: Chart,
    plots: str,
    tools: str,
    keys: Sequence[tuple[str, str, str]],
    data: Mapping[str, object],
    classes: str,
    note: str | None = None,
) -> str:
    note = chart.note if note is None else note
    tools = f'<div class="tools">{tools}</div>' if tools else ""
    below = f'<p class="note">{escape(note.strip())}</p>' if note else ""
    return (
        f'<figure class="chart {"wide " if chart.wide else ""}{classes}">'
        f'<figcaption><h3>{escape(chart.title)}</h3><span class="unit">{escape(chart.unit)}</span>{tools}</figcaption>'
        f"{legend(keys) if len(keys) > 1 else ''}{plots}{below}"
        f'<script type="application/json">{embed(data)}</script></figure>'
    )


def embed(data: object) -> str:
    """JSON that may stand inside a script element: no text in it can close that element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _numbers(series: Series) -> dict[str, list[float | str]]:
    return {
        "at": [float(f"{x:.9g}") for x in series.x],
        "y": [float(f"{y:.6g}") if math.isfinite(y) else figure(y) for y in series.y],
    }


def _across(chart: Chart, values: Sequence[float]) -> tuple[Scale, list[str]]:
    """The scale of x and the texts of its ticks."""
    if chart.x_name == "size":
        across = scale.steps(values)
        return across, [binary_size(2**tick) for tick in across.ticks]
    if chart.x_name != "step":
        return scale.times(values)
    across = scale.steps(values)
    short = bool(across.ticks) and across.ticks[-1] >= 10_000
    return across, [amount(tick) if short and tick else f"{tick:,.0f}" for tick in across.ticks]


def _plot(
    chart: Chart,
    lines: Sequence[Line],
    groups: Sequence[str],
    across: Scale,
    below: Sequence[str],
    up: Scale,
    shown: bool,
) -> str:
    shapes, odd = [], []
    for line in lines:
        number = groups.index(line.group or line.name)
        series = thin(line.series)
        smooth = line.smooth and len(line.series) > 10
        look = f"{line.colour}{' dashed' if line.dashed else ''}"
        tag = f'data-series="{number}"'
        shapes.append(f'<path class="line {"raw " if smooth else ""}{look}" {tag} d="{_path(series, across, up)}"/>')
        if smooth:
            mean = _path(running_mean(line.series, most=MEAN_POINTS), across, up)
            shapes.append(f'<path class="line mean {look}" {tag} d="{mean}"/>')
        if line.dots or len(series) == 1:
            shapes.append(f'<path class="dots {line.colour}" {tag} d="{_dots(series, across, up)}"/>')
        for x, y in zip(series.x, series.y, strict=True):
            if not math.isfinite(y):
                text = escape(f"{line.name}: {figure(y)} at {chart.x_name} {figure(x, 9)}")
                odd.append(f'<b class="odd" {tag} style="left:{across.place(x) * 100:.2f}%" title="{text}">×</b>')
    return _frame(chart, across, below, up, "".join(shapes), shown, "".join(odd[:50]))


def _frame(
    chart: Chart, across: Scale, below: Sequence[str], up: Scale, shapes: str, shown: bool, above: str = ""
) -> str:
    """The plot with grid, tick labels and marks around the shapes."""
    form = FORMATS[chart.form]
    rows = [(up.place(tick), _tick(tick, up, form)) for tick in up.ticks]
    grid = "".join(f'<path class="grid" d="M0 {1000 - p * 1000:.1f}H1000"/>' for p, _ in rows)
    marks = "".join(
        f'<path class="mark" d="M{across.place(x) * 1000:.1f} 0V1000"><title>{escape(text)}</title></path>'
        for x, text in chart.marks
        if across.low <= x <= across.high
    )
    left = "".join(f'<span style="top:{(1 - p) * 100:.2f}%">{escape(text)}</span>' for p, text in rows)
    labels = "".join(
        f'<span style="left:{across.place(tick) * 100:.2f}%">{escape(text)}</span>'
        for tick, text in zip(across.ticks, below, strict=True)
    )
    kind = "log" if up.log else "linear"
    label = escape(f"{chart.title} over {chart.x_name}")
    return (
        f'<div class="plot" data-scale="{kind}"{"" if shown else " hidden"}>'
        f'<div class="ys" aria-hidden="true">{left}</div>'
        f'<div class="area" tabindex="0" role="img" aria-label="{label}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{grid}{marks}{shapes}</svg>'
        f'{above}</div><div class="xs" aria-hidden="true">{labels}<em>{escape(chart.x_name)}</em></div></div>'
    )


def _tick(tick: float, up: Scale, form: Callable[[float], str]) -> str:
    if up.log or form is not figure or len(up.ticks) < 2:
        return form(tick)
    step = up.ticks[1] - up.ticks[0]
    digits = max(1, math.floor(math.log10(max(map(abs, up.ticks)))) - math.floor(math.log10(step) + 1e-9) + 2)
    return figure(tick, digits)


def _point(x: float, y: float, across: Scale, up: Scale) -> tuple[str, str]:
    height = min(max(up.place(y), 0.0), 1.0)  # zero on a log scale, and columns that are cut, end at the plot's edge
    return f"{across.place(x) * 1000:.1f}", f"{1000 - height * 1000:.1f}"


def _path(series: Series, across: Scale, up: Scale) -> str:
    """A polyline that breaks at non-finite values."""
    pieces, pen = [], "M"
    for x, y in zip(series.x, series.y, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        pieces.append(f"{pen}{' '.join(_point(x, y, across, up))}")
        pen = "L"
    return "".join(pieces)


def _dots(series: Series, across: Scale, up: Scale) -> str:
    """Lines of no length: round caps make dots of them that the stretched box leaves round."""
    finite = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    return "".join(f"M{' '.join(_point(x, y, across, up))}h.01" for x, y in finite)


def _band(starts: Sequence[float], base: Sequence[float], top: Sequence[float], across: Scale, up: Scale) -> str:
    there, back = [], []
    for left, right, low, high in zip(starts, starts[1:], base, top, strict=False):
        (x, y), (end, foot) = _point(left, high, across, up), _point(right, low, across, up)
        there.append(f"{x} {y}L{end} {y}")
        back.append(f"{end} {foot}L{x} {foot}")
    return f"M{'L'.join(there)}L{'L'.join(reversed(back))}Z"
