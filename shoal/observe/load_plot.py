"""What `shoal bench serve` measured, drawn: latencies by percentile of each load, and by rate of the open ones."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.observe import picture
from shoal.observe.curves import Series
from shoal.observe.picture import Panel
from shoal.observe.units import figure

PLACES = (0.0, 1.0, 2.0, 3.0)  # p0, p90, p99, p99.9: how many nines a percentile has


def write(result: Mapping[str, Any], file: Path) -> None:
    """An SVG of what shoal.serve.load.measure gives, or of its JSON. Raises UserError when it cannot be written."""
    picture.write(drawn(result), file)


def drawn(result: Mapping[str, Any]) -> str:
    by_percentile = {row["load"]: _nines(row["curve_ms"]) for row in result["rows"] if row["curve_ms"]}
    panels = [Panel("Latency by percentile", "ms", by_percentile, _percentile, PLACES, log=True)]
    rates = sorted((row for row in result["rows"] if "rate" in row and row["ms"]), key=lambda row: row["rate"])
    if len(rates) > 1:
        across = tuple(float(row["rate"]) for row in rates)
        lines = {q: Series(across, tuple(row["ms"][q] for row in rates)) for q in ("p50", "p99")}
        panels.append(Panel("Latency by rate", "ms, over requests a second", lines, figure, log=True))
    machine = result["machine"]
    about = f"{result['target']}: {machine['cores']} cores, load {machine['load_average']:.1f}; from when each was due"
    return picture.picture([panels], about)


def _nines(curve: list[list[float]]) -> Series:
    """What lies beyond the last place, up to p100 with its endless nines, is not drawn."""
    points = [(-math.log10(1 - share / 100), value) for share, value in curve if share < 99.95]
    return Series(tuple(x for x, _ in points), tuple(y for _, y in points))


def _percentile(place: float) -> str:
    return f"p{100 * (1 - 10**-place):g}"
