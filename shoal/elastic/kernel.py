"""What the kernel says of a worker: whether it is stopped, asleep or computing, and how much it has computed."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from shoal.comm.agent import in_words, process_fields

COMPUTING = "computing"
_TICKS = os.sysconf("SC_CLK_TCK")
_ALL_THREADS = 2  # of a process's clock: see clock_getcpuclockid(3)


class Look(NamedTuple):
    state: Callable[[], str]  # asked for only of who seems to stand still: reading it takes several files
    cpu_s: float  # since the process began; 0.0 where the kernel does not say


def look(pid: int) -> Look:
    return Look(partial(_state, pid), _cpu_s(pid))


def _cpu_s(pid: int) -> float:
    """A call of a microsecond, or else a file."""
    with suppress(OSError):
        return time.clock_gettime(~pid << 3 | _ALL_THREADS)
    fields = process_fields(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def _state(pid: int) -> str:
    """As `in_words` says it; computing when any thread is, or waits for a core."""
    state = in_words(process_fields(pid))
    with suppress(OSError):
        if state == "asleep" and any(_runs(pid, thread) for thread in os.listdir(f"/proc/{pid}/task")):
            state = COMPUTING
    return state


def _runs(pid: int, thread: str) -> bool:
    return process_fields(f"{pid}/task/{thread}")[:1] == ["R"]
