"""Which charts a report holds: from the curves of one run, or of several laid over each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.observe.curves import PARTS, Curves, Series
from shoal.observe.svg import Chart, Line, line_chart, stacked_chart

COLOURS = 8  # c0 to c7 of style.css


@dataclass(frozen=True)
class Named:
    """The curves of one run under the name that the report gives it."""

    name: str
    curves: Curves


def colour(number: int) -> str:
    return f"c{number % COLOURS}"


def learning(runs: Sequence[Named]) -> str:
    """Loss, held-out figures, learning rate and gradient norm."""
    charts = [line_chart(_loss(runs, by_time=False))]
    if len(runs) > 1:
        charts.append(line_chart(_loss(runs, by_time=True)))
    figures = {name: None for run in runs for split in run.curves.evaluated.values() for name in split}
    charts += [line_chart(_held_out(runs, name)) for name in figures if name not in ("loss", "count")]
    charts.append(line_chart(_of_step(runs, "Gradient norm", "before clipping", lambda c: c.grad_norm, smooth=True)))
    charts.append(line_chart(_of_step(runs, "Learning rate", "", lambda c: c.lr, zero=True)))
    return "".join(charts)


def speed(runs: Sequence[Named]) -> str:
    """Throughput, the parts of each step, waiting for data."""
    targets = any(targets_matter(run.curves) for run in runs)
    charts = []
    if targets:
        charts.append(_throughput(runs, "targets", lambda c: c.targets_per_s))
    if not targets or any(_ratio_changes(run.curves) for run in runs):
        charts.append(_throughput(runs, "samples", lambda c: c.samples_per_s))
    stack = ""
    if len(runs) == 1:
        parts = runs[0].curves.parts
        lines = [Line(part, f"part-{part}", parts[part]) for part in PARTS if part in parts]
        title = "Where each step’s time goes"
        stack = stacked_chart(Chart(title, "rank 0", lines, "seconds", marks=marks(runs), wide=True))
        waits = [
            Line(f"rank {rank}", colour(i), series, smooth=True)
            for i, (rank, series) in enumerate(runs[0].curves.waited.items())
        ]
    else:
        waits = [Line(run.name, colour(i), _most(run.curves), smooth=True) for i, run in enumerate(runs)]
    unit = "share of each step" if len(runs) == 1 else "share of each step, the rank that waited longest"
    charts.append(line_chart(Chart("Waiting for data", unit, waits, "share", zero=True, marks=marks(runs))))
    return "".join(charts) + stack


def marks(runs: Sequence[Named]) -> list[tuple[float, str]]:
    """Where a run was resumed or stopped, as vertical lines; for one run only: with several they would only confuse."""
    if len(runs) > 1:
        return []
    curves = runs[0].curves
    lines = [(float(resume.step), f"resumed from step {resume.step}") for resume in curves.resumes]
    return lines + [(float(stop.step), f"{stop.kind} at step {stop.step}") for stop in curves.stops if stop.step]


def over_time(series: Series, curves: Curves) -> Series:
    """The series over seconds spent in steps instead of over steps; points of steps without a time are left out."""
    elapsed = dict(zip(curves.elapsed_s.x, curves.elapsed_s.y, strict=True))
    pairs = [(elapsed[x], y) for x, y in zip(series.x, series.y, strict=True) if x in elapsed]
    return Series(tuple(x for x, _ in pairs), tuple(y for _, y in pairs))


def _loss(runs: Sequence[Named], by_time: bool) -> Chart:
    lines = []
    for i, run in enumerate(runs):
        splits = {name: split["loss"] for name, split in run.curves.evaluated.items() if "loss" in split}
        single = len(runs) == 1
        train = "train" if single else f"{run.name} · train" if splits else run.name
        series = {train: run.curves.loss}
        series |= {name if single else f"{run.name} · {name}": values for name, values in splits.items()}
        for j, (name, values) in enumerate(series.items()):
            placed = over_time(values, run.curves) if by_time else values
            shade = colour(j if single else i)
            look = {"smooth": j == 0, "dots": j > 0, "dashed": j > 0 and not single}
            lines.append(Line(name, shade, placed, **look, group="" if single else run.name))
    unit = "mean of a target"
    if len(runs) > 1 and any(line.dashed for line in lines):
        unit += "; full lines: training, dashed: held out"
    if by_time:
        return Chart("Loss over time", f"{unit}; time spent in steps", lines, x_name="time", wide=True)
    return Chart("Loss", unit, lines, marks=marks(runs), wide=True)


def _held_out(runs: Sequence[Named], name: str) -> Chart:
    lines = []
    for i, run in enumerate(runs):
        splits = {split: figures[name] for split, figures in run.curves.evaluated.items() if name in figures}
        for j, (split, series) in enumerate(splits.items()):
            single = len(runs) == 1
            label = split if single else f"{run.name} · {split}"
            # on their own, the splits keep the colours that they have in the chart of losses
            lines.append(
                Line(
                    label,
                    colour(j + 1 if single else i),
                    series,
                    dots=True,
                    dashed=j > 0 and not single,
                    group="" if single else run.name,
                )
            )
    shares = all(0 <= y <= 1 for line in lines for y in line.series.y) and name != "loss"
    unit = ", ".join(dict.fromkeys(split for run in runs for split in run.curves.evaluated))
    return Chart(name.replace("_", " ").capitalize(), unit, lines, "share" if shares else "figure", marks=marks(runs))


def _of_step(
    runs: Sequence[Named],
    title: str,
    unit: str,
    series: Callable[[Curves], Series],
    zero: bool = False,
    smooth: bool = False,
) -> Chart:
    name = title.lower()
    lines = [
        Line(name if len(runs) == 1 else run.name, colour(i), series(run.curves), smooth=smooth)
        for i, run in enumerate(runs)
    ]
    values = sorted(y for line in lines for y in line.series.y if y == y and y > 0)
    spiky = bool(values) and values[-1] > 30 * values[len(values) // 2]
    return Chart(title, unit, lines, zero=zero, log_first=spiky and smooth, marks=marks(runs))


def _throughput(runs: Sequence[Named], unit: str, series: Callable[[Curves], Series]) -> str:
    lines = [
        Line(unit if len(runs) == 1 else run.name, colour(i), series(run.curves), smooth=True)
        for i, run in enumerate(runs)
    ]
    return line_chart(Chart("Throughput", f"{unit} a second", lines, "amount", zero=True, marks=marks(runs)))


def targets_matter(curves: Curves) -> bool:
    """Whether targets are worth a chart of their own: they are not when each sample is one target."""
    return bool(curves.targets_per_s.y) and curves.targets_per_s.y != curves.samples_per_s.y


def _ratio_changes(curves: Curves) -> bool:
    """Whether samples hold unlike numbers of targets, so that the two rates tell different things."""
    ratios = [t / s for t, s in zip(curves.targets_per_s.y, curves.samples_per_s.y, strict=False) if s > 0]
    return bool(ratios) and max(ratios) > 1.01 * min(ratios)


def _most(curves: Curves) -> Series:
    """The largest share of waiting over the ranks, step by step."""
    most: dict[float, float] = {}
    for series in curves.waited.values():
        for x, y in zip(series.x, series.y, strict=True):
            most[x] = max(y, most.get(x, 0.0))
    return Series(tuple(sorted(most)), tuple(most[x] for x in sorted(most)))
