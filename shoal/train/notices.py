"""Notices that a run is to end soon, from wherever they come: signals, a file, an address. All of them mean: drain."""

import json
import signal
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from shoal.errors import UserError

LATELY = 50  # committed steps that an estimate is made from
LOOK_S = 1.0  # between two looks at a file or an address
ANSWER_S = 2.0  # how long an address may take
LARGEST = 1 << 16  # bytes of a notice
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # a pod's TERM, Slurm's --signal=USR1@60


@dataclass(frozen=True)
class Notice:
    """Where a notice may come from besides signals, and how long there is from it to the kill.

    ``source``: a file, which is a notice as soon as it is there, or an http address, which is one as soon as it answers
    200, as those of spot machines do. What it says may be a number of seconds or JSON with a ``time``."""

    source: str = ""
    grace_s: float = 0.0  # 0: not known

    def __post_init__(self) -> None:
        if self.grace_s < 0:
            raise UserError(f"--grace {self.grace_s:g}: seconds from 0 on are meant.")
        if "://" in self.source and not self.source.startswith(("http://", "https://")):
            raise UserError(
                f"--notice {self.source!r}: give a file, or an address that begins with http:// or https://."
            )

    def look(self) -> str | None:
        """What the source says; None while there is no notice."""
        try:
            if "://" in self.source:
                with urllib.request.urlopen(self.source, timeout=ANSWER_S) as answer:
                    return str(answer.read(LARGEST).decode(errors="replace")) if answer.status == 200 else None
            with Path(self.source).open("rb") as file:
                return file.read(LARGEST).decode(errors="replace")
        except (OSError, ValueError):  # not there (yet), or not reachable: no notice
            return None


def grace_of(text: str, now: float) -> float:
    """Seconds that a notice gives: a number, or the JSON of a spot machine, {"action": ..., "time": "...Z"}.

    0.0 where it says none. ``now``: Unix seconds."""
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            at = datetime.fromisoformat(str(found["time"]))
            return max(0.0, (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now)
        return max(0.0, float(found))
    except (ValueError, KeyError, TypeError):
        return 0.0


def needed_s(events: Sequence[Mapping[str, Any]], *, whole: bool) -> float:
    """How long a drain will take: two steps at worst (one may just have begun), and a checkpoint for a whole run."""
    steps = [float(e["seconds"]) for e in events if e["event"] == "committed"][-LATELY:]
    saves = [float(e["stall_s"]) + float(e["write_s"]) for e in events if e["event"] == "checkpointed"]
    step = max(steps, default=0.0)
    return 2 * step + (max(saves[-LATELY:], default=statistics.fmean(steps) if steps else 0.0) if whole else 0.0)


class Drain:
    """The first notice asks the workers to stop after their step; the same one again interrupts for good."""

    def __init__(self, notice: Notice, say: Callable[[str], None]) -> None:
        self.asked = False
        self._notice, self._say = notice, say
        self._ask: Callable[[], None] | None = None
        self._leave: Callable[[], None] | None = None
        self._seen: set[int] = set()  # signals
        self._events: list[Mapping[str, Any]] = []
        self._ends = threading.Event()

    def reach(self, ask: Callable[[], None], leave: Callable[[], None] | None = None) -> None:
        """From now on there are workers, and ``ask`` asks them. ``leave``: of several hosts, what is done on a notice
        to this one, which the others go on without."""
        self._ask, self._leave = ask, leave

    def heard(self, event: Mapping[str, Any]) -> None:
        """Of the run: what an estimate is made from."""
        if event["event"] in ("committed", "checkpointed"):
            self._events = [*self._events[-2 * LATELY :], event]

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._ask is None or (self.asked and (number in self._seen or number == signal.SIGINT)):
            raise KeyboardInterrupt
        self._seen.add(number)
        self._drain(signal.Signals(number).name, self._notice.grace_s)

    def watch(self) -> None:
        """Until there is a notice, or the run has ended."""
        while not self._ends.wait(LOOK_S):
            text = self._notice.look() if self._ask is not None else None
            if text is None:
                continue
            grace_s = grace_of(text, time.time()) or self._notice.grace_s
            if self._leave is None:
                self._drain(self._notice.source, grace_s)
            else:
                self._say(f"{self._notice.source}: this host leaves after this step{self._whether(grace_s)}")
                self._leave()
            return

    def end(self) -> None:
        self._ends.set()

    def _drain(self, origin: str, grace_s: float) -> None:
        if self.asked or self._ask is None:
            return
        self.asked = True
        self._say(f"{origin}: stopping after this step; once more to stop at once{self._whether(grace_s)}")
        self._ask()

    def _whether(self, grace_s: float) -> str:
        if not grace_s:
            return ""
        needed = needed_s(self._events, whole=True)
        will = "will do" if needed <= grace_s else "is short: a kill may cost the steps since the last checkpoint"
        return f". The {grace_s:g} s of grace {will} (expected: {needed:.2f} s)"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def drains(notice: Notice | None = None) -> Iterator[Drain]:
    """Notices go to the workers, in an orderly way."""
    notice = notice or Notice()
    drain = Drain(notice, _say)
    watcher = threading.Thread(target=drain.watch, name="notices", daemon=True) if notice.source else None
    with handled(drain.on_signal):
        if watcher:
            watcher.start()
        try:
            yield drain
        finally:
            drain.end()
            if watcher:
                watcher.join(ANSWER_S + LOOK_S)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signal handlers can be set from the main thread only; elsewhere (some notebooks) the default stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, handler) for number in SIGNALS]
    try:
        yield
    finally:
        for number, old in zip(SIGNALS, before, strict=True):
            signal.signal(number, old)
