"""How events are shown while a run goes on: a live line on a terminal, plain lines elsewhere, JSON on request."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from shoal.cli.output import count, duration, event_line, figures

if TYPE_CHECKING:
    from rich.console import Console

WINDOW = 20  # steps over which rates are taken
LIVE_EVERY_S = 0.1
PLAIN_EVERY_S = 5.0
CHANGE_LENGTH = ("started", "rebatched")  # events that say how many steps the run has

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Pace:
    """The figures of the last few steps."""

    step: int
    total: int  # 0: not known
    loss: float
    rate: float  # units a second
    unit: str  # "tokens" where a sample has several targets, else "samples"
    eta_s: float | None
    waiting: float  # share of the time that the slowest worker waited for data

    def line(self) -> str:
        steps = f"step {self.step}/{self.total}" if self.total else f"step {self.step}"
        parts = [steps, f"loss {self.loss:.4f}", f"{count(self.rate)} {self.unit}/s", f"data wait {self.waiting:.0%}"]
        if self.eta_s is not None:
            parts.insert(3, f"{duration(self.eta_s)} left")
        return "  ".join(parts)


def pace(recent: "deque[Event]", total: int) -> Pace:
    """From the newest ``committed`` events, at least one; their seconds are those of rank 0."""
    last = recent[-1]
    seconds = max(sum(event["seconds"] for event in recent), 1e-9)
    tokens = any(event["targets"] != event["samples"] for event in recent)
    done = sum(event["targets" if tokens else "samples"] for event in recent)
    waited = sum(max(event.get("waited", {}).values(), default=0.0) for event in recent)
    return Pace(
        step=last["step"],
        total=total,
        loss=float(last["loss"]),
        rate=done / seconds,
        unit="tokens" if tokens else "samples",
        eta_s=(total - last["step"]) * seconds / len(recent) if total else None,
        waiting=min(waited / seconds, 1.0),
    )


def remark(event: Event) -> str | None:
    """The line that an event other than a step deserves, if any."""
    kind = event["event"]
    if kind == "started":
        workers = event["workers"]
        shards = f" of {'+'.join(map(str, event['placement']))} shards" if event.get("placement") else ""
        return (
            f"{count(event['parameters'])} parameters, {workers} worker{'s' if workers != 1 else ''}{shards} on "
            f"{event['device']}, {event['precision']}{_states(event)}{_lossy(event)}"
        )
    if kind == "evaluated":
        return f"step {event['step']}  {event['split']}: {figures(event['figures'])}"
    if kind == "resumed":
        skipped = [f"; left out {skip['path']}: {skip['why']}" for skip in event.get("skipped", ())]
        return f"resumed from {event['checkpoint']} at step {event['step']}{''.join(skipped)}{_lossy(event)}"
    if kind == "interrupted":
        return f"interrupted at step {event['step']}: {event['why']}"
    if kind == "rebatched":
        rate = f"lr {event['lr_before']:.3g} -> {event['lr']:.3g}"
        change = f"{event['before']} -> {event['batch']} samples, {rate}"
        return f"rebatched after step {event['step']}: {change}: {event['why']}"
    if kind in ("lost", "suspected", "recovered", "resized", "rebalanced", "paused", "slow"):
        after = f", {event['cost_s']:.2f} s" if event["cost_s"] else ""
        size = f", {event['workers']} workers" if "workers" in event else ""
        return f"{kind} after step {event['step']}{size}{after}: {event['why']}"
    if kind == "proved":
        model = f"{event['model']}: " if "model" in event else ""
        how = f"error {event['error']:.2g}" if event["ok"] else "DIFFERS"
        return f"{event['number']}/{event['of']}  {model}{event['plan']}  {how}  {event['seconds']:.1f} s"
    return None  # a failure is told by the error that ends the command


def _states(event: Event) -> str:
    return f", states {event['states']}" if event.get("states") else ""


def _lossy(event: Event) -> str:
    return f"; lossy: {event['lossy']}" if event.get("lossy") else ""


class Display(Protocol):
    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> "Display": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Ends:
    """A display that has nothing to put back."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class JsonLines(_Ends):
    """Each event as one JSON line on stderr."""

    def __enter__(self) -> "JsonLines":
        return self

    def __call__(self, event: Event) -> None:
        event_line(event)


class PlainLines(_Ends):
    """A line every few seconds and at the last step, for logs and pipes."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._recent: deque[Event] = deque(maxlen=WINDOW)
        self._total = 0
        self._last_s: float | None = None

    def __enter__(self) -> "PlainLines":
        return self

    def __call__(self, event: Event) -> None:
        self._total = event.get("steps", self._total) if event["event"] in CHANGE_LENGTH else self._total
        if event["event"] == "committed":
            self._recent.append(event)
            now = self._clock()
            due = self._last_s is None or now - self._last_s >= PLAIN_EVERY_S
            if due or event["step"] == self._total:
                self._last_s = now
                self._print(pace(self._recent, self._total).line())
        elif (line := remark(event)) is not None:
            self._print(line)

    def _print(self, line: str) -> None:
        print(line, file=self._out, flush=True)


class LiveLine:
    """One line that is drawn again in place, above it the remarks.

    Drawn from the events themselves and never from a thread: the run may fork."""

    def __init__(self, console: "Console | None" = None, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._clock = clock
        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._recent: deque[Event] = deque(maxlen=WINDOW)
        self._total = 0
        self._drawn_s = float("-inf")

    def __enter__(self) -> "LiveLine":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        if event["event"] in CHANGE_LENGTH:
            self._total = event.get("steps", 0)
        if event["event"] == "committed":
            self._recent.append(event)
            if self._clock() - self._drawn_s < LIVE_EVERY_S and event["step"] != self._total:
                return
            self._bar.update(
                self._task,
                completed=event["step"],
                total=self._total or None,
                description=pace(self._recent, self._total).line(),
            )
        elif (line := remark(event)) is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            return
        self._drawn_s = self._clock()
        self._bar.refresh()


class Silence(_Ends):
    """For the ranks that another process speaks for."""

    def __enter__(self) -> "Silence":
        return self

    def __call__(self, event: Event) -> None: ...


def display(json: bool, speaks: bool = True) -> Display:
    """The display that fits where the output goes."""
    if not speaks:
        return Silence()
    if json:
        return JsonLines()
    return LiveLine() if sys.stdout.isatty() else PlainLines(sys.stdout)
