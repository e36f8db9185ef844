"""What each kind of fault does, in the worker that it happens to."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.elastic import roster

if TYPE_CHECKING:
    from shoal.train.worker import Worker

Undo = Callable[[], None]
LASTS = 6  # steps after which what can be undone is
THAW_S = 0.5
SKEW_S = 3600.0
ROOM = 512  # bytes that any file may still have when the disk is "full"


@dataclass(frozen=True)
class Deed:
    """``do`` is called with the worker, None before it has joined, and the run's folder."""

    do: Callable[["Worker | None", Path], Undo | None]
    ends: bool  # the worker does not live through it
    says: str  # for people


def _signal(number: signal.Signals) -> Callable[["Worker | None", Path], None]:
    return lambda worker, run: os.kill(os.getpid(), number)


def _thaw(worker: "Worker | None", run: Path) -> None:
    """Stopped, and after a moment let go on by somebody else."""
    command = f"sleep {THAW_S}; kill -CONT {os.getpid()}"
    helper = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL)
    os.kill(os.getpid(), signal.SIGSTOP)
    helper.wait()


def _flip(worker: "Worker | None", run: Path) -> None:
    """One bit of the first parameter, as memory without a parity check does it."""
    import torch

    assert worker is not None
    first = next(iter(worker.held.module.parameters())).data.view(-1)
    size = first.element_size()
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    words = first.view(kinds[size]) if size in kinds else first.view(torch.int8)
    words[0] ^= 1 << (8 * size * 11 // 16)


def _nan(worker: "Worker | None", run: Path) -> None:
    """The next gradient of the first parameter, and no later one, is not a number."""
    assert worker is not None

    def spoil(gradient: "object") -> "object":
        hook.remove()
        return gradient * float("nan")  # type: ignore[operator]

    first = next(p for p in worker.held.module.parameters() if p.requires_grad)
    hook = first.register_hook(spoil)  # type: ignore[no-untyped-call]


def _skew(worker: "Worker | None", run: Path) -> Undo:
    """This worker's clocks are an hour ahead, its own reports included."""
    wall, steady = time.time, time.monotonic
    time.time = lambda: wall() + SKEW_S
    time.monotonic = lambda: steady() + SKEW_S
    report = worker.group.report if worker is not None else None
    clock = report._clock if report is not None else None
    if report is not None and clock is not None:
        report._clock = lambda: clock() + SKEW_S

    def undo() -> None:
        time.time, time.monotonic = wall, steady
        if report is not None and clock is not None:
            report._clock = clock

    return undo


def _fill(worker: "Worker | None", run: Path) -> Undo:
    """No file of this process can grow beyond a few bytes, until later."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _largest_of_newest(run: Path) -> Path | None:
    folders = sorted((run / "checkpoints").glob("step-*"))
    files = [file for folder in folders[-1:] for file in folder.iterdir()]
    return max(files, key=lambda file: file.stat().st_size, default=None)


def _tear(worker: "Worker | None", run: Path) -> None:
    """The newest checkpoint loses its last bytes, then all workers are killed: only the disk is left."""
    file = _largest_of_newest(run)
    if file is not None:
        os.truncate(file, file.stat().st_size * 2 // 3)
    _kill_all(run)


def _rot(worker: "Worker | None", run: Path) -> None:
    """One bit of the newest checkpoint flips, then all workers are killed."""
    file = _largest_of_newest(run)
    if file is not None:
        with file.open("r+b", buffering=0) as stream:
            place = file.stat().st_size // 2
            byte = os.pread(stream.fileno(), 1, place)
            os.pwrite(stream.fileno(), bytes([byte[0] ^ 16]), place)
    _kill_all(run)


def _kill_all(run: Path) -> None:
    for entry in roster.read(run):
        if entry.pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(entry.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


DEEDS = {
    "kill": Deed(_signal(signal.SIGKILL), True, "killed by SIGKILL"),
    "stop": Deed(_signal(signal.SIGSTOP), True, "stopped for good"),
    "thaw": Deed(_thaw, False, f"stopped, and thawed after {THAW_S:g} s"),
    "flip": Deed(_flip, True, "a bit of its parameters flips in memory"),
    "nan": Deed(_nan, False, "one gradient is not a number, once"),
    "skew": Deed(_skew, False, f"its clocks are {SKEW_S:.0f} s ahead for {LASTS} steps"),
    "fill": Deed(_fill, False, f"it can write no file for {LASTS} steps, as on a full disk"),
    "tear": Deed(_tear, True, "the newest checkpoint is cut short and all workers are killed"),
    "rot": Deed(_rot, True, "a bit of the newest checkpoint flips and all workers are killed"),
}
