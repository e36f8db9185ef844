"""The section on pipelines: how long stages stood still, by formula and measured, and what the pipeline gained."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from statistics import fmean, median
from typing import Any

from shoal.errors import UserError
from shoal.observe.curves import Event, number
from shoal.observe.units import duration, share
from shoal.parallel.schedules import make_schedule
from shoal.parallel.schedules.simulation import Timeline, simulate
from shoal.run.run import Run

WARM_UP = 3  # first steps of a session, which allocate
OFF = "off"  # the schedule that is no pipeline: one micro-batch at a time goes through the layers


@dataclass(frozen=True)
class Stage:
    """What the mean step was for one worker."""

    busy_s: float
    waiting_s: float
    seconds: float  # from the step's start to the worker's last pass
    peak: float  # (chunk, micro-batch) pairs with activations

    @property
    def waiting_share(self) -> float:
        return self.waiting_s / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Pipelined:
    """What the log of the newest session says of a run in stages."""

    schedule: str
    workers: int  # along axis pipe
    step_s: float  # the median step of rank 0, all of it
    stages: tuple[Stage, ...]  # of all workers, by rank; () before a step has told
    timeline: Timeline | None  # of a full step, all passes equally long; None for a schedule from a file

    @property
    def still(self) -> float:
        """The share of all workers' time without work, from the start of the first pass to the end of the last."""
        whole = max((stage.seconds for stage in self.stages), default=0.0)
        return 1 - fmean(stage.busy_s for stage in self.stages) / whole if whole else 0.0

    @property
    def gain(self) -> float:
        """How many times as long one worker would take for the passes of a replica, at the same speed."""
        return self.workers * (1 - self.still)


def of_run(run: Run, events: Sequence[Event] | None = None) -> Pipelined | None:
    """None for a run without stages. ``events``: its log, where somebody has read it."""
    log = list(run.events()) if events is None else events
    if not any(isinstance(event.get("split"), Mapping) for event in log):
        return None
    return read_pipeline(log, run.recipe.micro_batches, run.plan.pipeline.chunks)


def read_pipeline(events: Iterable[Event], micro_batches: int, chunks: int) -> Pipelined | None:
    """None for a run without stages. ``micro_batches`` of a shard; ``chunks`` of a stage."""
    split: Mapping[str, Any] = {}
    placement: Sequence[Any] = ()
    seconds: list[float] = []
    rows: list[Any] = []
    for event in events:
        if event.get("event") == "started":
            split, placement, seconds, rows = event.get("split") or {}, event.get("placement") or (), [], []
            first = number(event.get("step")) or 0.0
        elif event.get("event") == "committed" and split and (number(event.get("step")) or 0.0) > first + WARM_UP:
            seconds += [took] if (took := number(event.get("seconds"))) is not None else []
            rows += [told] if _whole(told := event.get("stages")) else []
    schedule, mesh = split.get("schedule"), split.get("mesh")
    workers = int(number(mesh.get("pipe")) or 1) if isinstance(mesh, Mapping) else 1
    if not isinstance(schedule, str) or workers < 2:
        return None
    ranks = len(rows[-1]) if rows else 0
    told = [each for each in rows if len(each) == ranks]
    stages = [Stage(*(fmean(row[rank][key] for row in told) for key in range(4))) for rank in range(ranks)]
    shards = max((int(number(each) or 0) for each in placement), default=0)
    timeline = _timeline(schedule, workers, shards * micro_batches, chunks)
    return Pipelined(schedule, workers, median(seconds) if seconds else 0.0, tuple(stages), timeline)


def _whole(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 4 and all(number(value) is not None for value in row) for row in rows
    )


def _timeline(schedule: str, workers: int, passes: int, chunks: int) -> Timeline | None:
    if schedule.endswith(".csv") or not passes:
        return None
    try:
        return simulate(make_schedule(schedule, workers, passes, chunks))
    except UserError:
        return None  # a name that this version does not know


def facts(told: Pipelined) -> dict[str, Any]:
    """For --json: shares of the passes' time that workers stand still, and times the speed of one worker."""
    still = told.timeline.bubble if told.timeline is not None else None
    return {
        "schedule": told.schedule,
        "workers": told.workers,
        "still_by_formula": still,
        "still": told.still if told.stages else None,
        "gain_by_formula": None if still is None else told.workers * (1 - still),
        "gain": told.gain if told.stages else None,
        "step_s": told.step_s,
        "stages": [asdict(stage) for stage in told.stages],
    }


def lines(told: Pipelined) -> list[str]:
    """What was foreseen and what was measured, for a terminal and for the page."""
    found = []
    if told.timeline is not None:
        still, count = told.timeline.bubble, told.timeline.schedule.micro_batches
        off = _timeline(OFF, told.workers, count, 1)
        said = (
            f"schedule {told.schedule}, {told.workers} stages, {count} micro-batches: by formula workers stand still "
        )
        said += f"{share(still)} of the passes' time, {_times(told.workers * (1 - still))} of one worker"
        if off is not None and told.schedule != OFF:
            said += f" and {_times((1 - still) / (1 - off.bubble))} of schedule off"
        found.append(said + ".")
    if told.stages:
        found.append(
            f"measured: they stood still {share(told.still)}, {_times(told.gain)} of one worker that makes all passes "
            f"as fast as they did; a step took {duration(told.step_s)}."
        )
    return found


def against_off(named: Sequence[tuple[str, Pipelined | None]]) -> list[str]:
    """Of runs laid side by side: how much faster than without pipelining each is, with as many stages."""
    found = []
    for _, off in named:
        if off is None or off.schedule != OFF or not off.step_s:
            continue
        for name, told in named:
            if told is not None and told.schedule != OFF and told.workers == off.workers and told.step_s:
                gained = off.step_s / told.step_s
                found.append(
                    f"{name}: pipelining ({told.schedule}) made a step {gained:.2f} times as fast as schedule off did: "
                    f"{duration(told.step_s)} against {duration(off.step_s)}."
                )
    return found


def _times(gain: float) -> str:
    return f"{gain:.2f} times the speed"


def section(named: Sequence[tuple[str, Pipelined | None]]) -> str:
    """Of one run, or of several one after the other; "" when none had stages."""
    text = "".join(f'<p class="finding notable">{escape(line)}</p>' for line in against_off(named))
    for name, told in named:
        if told is not None:
            heading = f"<h3>{escape(name)}</h3>" if len(named) > 1 else ""
            said = "".join(f'<p class="finding calm">{escape(line)}</p>' for line in lines(told))
            text += f"{heading}{said}{_table(told)}"
    return text


def _table(told: Pipelined) -> str:
    if not told.stages:
        return ""
    rows = "".join(
        f'<tr><th scope="row">rank {rank}</th><td class="value">{duration(stage.busy_s)}</td>'
        f'<td class="value">{duration(stage.waiting_s)}</td><td class="value">{share(stage.waiting_share)}</td>'
        f'<td class="value">{stage.peak:g}</td></tr>'
        for rank, stage in enumerate(told.stages)
    )
    return (
        '<div class="panel wide"><p class="note">Of a step, up to the worker’s last pass. Activations: the most chunks '
        "of micro-batches that wait for their backward pass at a time.</p>"
        '<div class="scroll"><table class="settings"><thead><tr><th></th><th>in passes</th><th>waiting for stages</th>'
        f"<th>share</th><th>activations</th></tr></thead><tbody>{rows}</tbody></table></div></div>"
    )
