"""What the event log says about a run, as typed series: pure, from a list of events to frozen values."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

PARTS = ("data", "forward", "backward", "stages", "exchange", "update", "checkpoint", "other")

Event = Mapping[str, Any]
State = Literal["finished", "failed", "interrupted", "open"]  # open: no end in the log; running still, or killed


@dataclass(frozen=True)
class Series:
    """Values over steps (or seconds), in rising order of ``x``. A value may be NaN or infinite."""

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    @property
    def last(self) -> float | None:
        return self.y[-1] if self.y else None


@dataclass(frozen=True)
class Session:
    """One start of the workers: a run that was resumed has several."""

    begun: float  # Unix seconds
    seen: float  # Unix seconds of its last event
    facts: Event  # the fields of `started`; empty when the log begins without one


@dataclass(frozen=True)
class Saved:
    time: float  # Unix seconds
    step: int
    path: str
    size_bytes: float
    stall_s: float
    write_s: float
    best: bool


@dataclass(frozen=True)
class Resume:
    time: float  # Unix seconds
    step: int
    checkpoint: str
    redone: int  # committed steps after the checkpoint, whose work was lost
    skipped: tuple[tuple[str, str], ...]  # (path, why) of checkpoints that could not be used


@dataclass(frozen=True)
class Sample:
    step: int
    text: str


@dataclass(frozen=True)
class Stop:
    time: float  # Unix seconds
    step: int | None
    kind: Literal["failed", "interrupted"]
    why: str


@dataclass(frozen=True)
class Curves:
    state: State = "open"
    step: int = 0  # the last one committed
    steps: int | None = None  # the length of the run, where it is known
    loss: Series = Series()  # mean over the targets of the step
    lr: Series = Series()
    grad_norm: Series = Series()
    seconds: Series = Series()  # of each step
    samples_per_s: Series = Series()
    targets_per_s: Series = Series()
    elapsed_s: Series = Series()  # step -> seconds spent in the steps so far, redone work left out
    parts: Mapping[str, Series] = field(default_factory=dict)  # part of `PARTS` -> seconds of each step on rank 0
    waited: Mapping[int, Series] = field(default_factory=dict)  # rank -> share of each step spent waiting for data
    evaluated: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)  # split -> figure -> values
    saved: tuple[Saved, ...] = ()
    resumes: tuple[Resume, ...] = ()
    samples: tuple[Sample, ...] = ()
    stops: tuple[Stop, ...] = ()
    sessions: tuple[Session, ...] = ()
    result: Event = field(default_factory=dict)  # what `ended` holds

    @property
    def wall_s(self) -> float:
        """Seconds from start to last sign of life, over all sessions; the time between them is left out."""
        return sum(session.seen - session.begun for session in self.sessions)

    @property
    def facts(self) -> Event:
        """What the newest session said about itself."""
        return self.sessions[-1].facts if self.sessions else {}

    @property
    def shares(self) -> dict[str, float]:
        """Part -> its share of the time of all steps; the shares add up to 1, or are empty without steps."""
        totals = {part: sum(series.y) for part, series in self.parts.items()}
        whole = sum(totals.values())
        return {part: total / whole for part, total in totals.items()} if whole > 0 else {}

    @property
    def waiting(self) -> dict[int, float]:
        """Rank -> its seconds of waiting for data over the seconds of the steps in which it took part."""
        lasted = dict(zip(self.seconds.x, self.seconds.y, strict=True))
        out = {}
        for rank, series in self.waited.items():
            whole = sum(lasted[x] for x in series.x)
            waited = sum(share * lasted[x] for x, share in zip(series.x, series.y, strict=True))
            out[rank] = waited / whole if whole > 0 else 0.0
        return out

    def active_s(self, time: float) -> float:
        """Seconds of running time at the Unix time ``time``: the time between sessions does not count."""
        passed = 0.0
        for session in self.sessions:
            passed += min(max(time - session.begun, 0.0), session.seen - session.begun)
        return passed

    def best(self, split: str, figure: str) -> tuple[int, float] | None:
        """(step, value) of the best finite figure on the split."""
        series = self.evaluated.get(split, {}).get(figure, Series())
        finite = [(y, -x) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
        if not finite:
            return None
        sign = -1 if lower_is_better(figure) else 1
        y, minus_x = max(finite, key=lambda pair: (sign * pair[0], pair[1]))  # the first step of several equals
        return int(-minus_x), y


def lower_is_better(figure: str) -> bool:
    return any(word in figure.lower() for word in ("loss", "perplexity", "error", "bits", "mse", "mae"))


def number(value: Any) -> float | None:
    """A finite or non-finite float, also from the text "nan"; None for anything else."""
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def read_curves(events: Iterable[Event]) -> Curves:
    """Sort the events of one run (see the table in docs/design.md) into series.

    A resumed run redoes the steps after its checkpoint: the log then holds a step twice, and the last one counts;
    steps after the checkpoint that were not redone yet are left out, since the run's weights do not hold them."""
    log = [event for event in events if isinstance(event.get("event"), str) and number(event.get("time")) is not None]
    commits: dict[int, Event] = {}
    evaluations: dict[tuple[str, int], Event] = {}
    samples: dict[int, Sample] = {}
    saved: list[Saved] = []
    resumes: list[Resume] = []
    stops: list[Stop] = []
    state: State = "open"
    result: Event = {}
    for event in log:
        kind, time = event["event"], float(event["time"])
        where = number(event.get("step"))
        step = int(where) if where is not None and math.isfinite(where) else None
        if kind == "started":
            state, result = "open", {}
        elif kind == "ended":
            state, result = "finished", _mapping(event.get("result"))
        elif kind in ("failed", "interrupted"):
            state = kind
            stops.append(Stop(time, step, kind, str(event.get("why", ""))))
        elif step is None:
            continue
        elif kind == "committed":
            commits[step] = event
        elif kind == "evaluated":
            evaluations[str(event.get("split", "held-out")), step] = event
        elif kind == "sampled":
            samples[step] = Sample(step, str(event.get("text", "")))
        elif kind == "checkpointed":
            size, stall, write = (number(event.get(key)) or 0.0 for key in ("bytes", "stall_s", "write_s"))
            saved.append(Saved(time, step, str(event.get("path", "")), size, stall, write, bool(event.get("best"))))
        elif kind == "resumed":
            state, result = "open", {}
            resumes.append(_resume(event, time, step, sum(done > step for done in commits)))
            commits = {done: commit for done, commit in commits.items() if done <= step}
            evaluations = {key: value for key, value in evaluations.items() if key[1] <= step}
            samples = {done: sample for done, sample in samples.items() if done <= step}
    rows = [commits[step] for step in sorted(commits)]
    sessions = _sessions(log)
    length = number(sessions[-1].facts.get("steps")) if sessions else None
    return Curves(
        state=state,
        step=max(commits, default=0),
        steps=int(length) if length else None,
        loss=_series(rows, lambda row: number(row.get("loss"))),
        lr=_series(rows, lambda row: number(row.get("lr"))),
        grad_norm=_series(rows, lambda row: number(row.get("grad_norm"))),
        seconds=_series(rows, _seconds),
        samples_per_s=_series(rows, lambda row: _rate(row, "samples")),
        targets_per_s=_series(rows, lambda row: _rate(row, "targets")),
        elapsed_s=_running_sum(_series(rows, _seconds)),
        parts=_parts(rows),
        waited=_waited(rows),
        evaluated=_figures(evaluations),
        saved=tuple(saved),
        resumes=tuple(resumes),
        samples=tuple(samples[step] for step in sorted(samples)),
        stops=tuple(stops),
        sessions=sessions,
        result=result,
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _series(rows: Sequence[Event], value: Callable[[Event], float | None]) -> Series:
    pairs = [(float(row["step"]), y) for row in rows if (y := value(row)) is not None]
    return Series(tuple(x for x, _ in pairs), tuple(y for _, y in pairs))


def _seconds(row: Event) -> float | None:
    seconds = number(row.get("seconds"))
    return seconds if seconds is not None and math.isfinite(seconds) and seconds > 0 else None


def _rate(row: Event, unit: str) -> float | None:
    amount, seconds = number(row.get(unit)), _seconds(row)
    return amount / seconds if amount is not None and seconds else None


def _running_sum(series: Series) -> Series:
    total, sums = 0.0, []
    for y in series.y:
        total += y
        sums.append(total)
    return Series(series.x, tuple(sums))


def _part(row: Event, part: str) -> float:
    seconds = number(_mapping(row.get("parts")).get(part))
    return max(0.0, seconds) if seconds is not None and math.isfinite(seconds) else 0.0


def _parts(rows: Sequence[Event]) -> dict[str, Series]:
    timed = [row for row in rows if _seconds(row)]
    parts = {part: _series(timed, lambda row, part=part: _part(row, part)) for part in PARTS[:-1]}  # type: ignore[misc]

    def rest(row: Event) -> float:
        return max(0.0, (_seconds(row) or 0.0) - sum(_part(row, part) for part in PARTS[:-1]))

    return {**parts, "other": _series(timed, rest)}


def _waited(rows: Sequence[Event]) -> dict[int, Series]:
    def share(row: Event, rank: str) -> float | None:
        waited, seconds = number(_mapping(row.get("waited")).get(rank)), _seconds(row)
        return waited / seconds if waited is not None and math.isfinite(waited) and seconds else None

    names = {str(rank) for row in rows for rank in _mapping(row.get("waited")) if str(rank).isdecimal()}
    return {int(rank): _series(rows, lambda row, rank=rank: share(row, rank)) for rank in sorted(names, key=int)}  # type: ignore[misc]


def _figures(evaluations: Mapping[tuple[str, int], Event]) -> dict[str, dict[str, Series]]:
    figures: dict[str, dict[str, Series]] = {}
    for split in dict.fromkeys(split for split, _ in evaluations):
        rows = [evaluations[key] for key in sorted(key for key in evaluations if key[0] == split)]
        names = dict.fromkeys(str(name) for row in rows for name in _mapping(row.get("figures")))
        figures[split] = {
            name: _series(rows, lambda row, name=name: number(_mapping(row.get("figures")).get(name)))  # type: ignore[misc]
            for name in names
        }
    return figures


def _resume(event: Event, time: float, step: int, redone: int) -> Resume:
    listed = event.get("skipped")
    skipped = [_mapping(item) for item in listed] if isinstance(listed, list | tuple) else []
    reasons = tuple((str(item.get("path", "")), str(item.get("why", ""))) for item in skipped)
    return Resume(time, step, str(event.get("checkpoint", "")), redone, reasons)


def _sessions(log: Sequence[Event]) -> tuple[Session, ...]:
    """`started` and `resumed` open a session; where they come together, in either order, they open one."""
    sessions: list[Session] = []
    worked = False  # whether the newest session has committed a step
    for event in log:
        kind, time = event["event"], float(event["time"])
        facts = event if kind == "started" else {}
        told = bool(sessions and sessions[-1].facts)
        if not sessions or (kind == "started" and (worked or told)) or (kind == "resumed" and worked):
            sessions.append(Session(time, time, facts))
            worked = False
        else:
            newest = sessions[-1]
            sessions[-1] = Session(newest.begun, max(newest.seen, time), facts or newest.facts)
        worked = worked or kind == "committed"
    return tuple(sessions)
