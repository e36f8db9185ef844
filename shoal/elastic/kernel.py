"""What the kernel says of a worker: whether it is stopped, asleep or computing, and how much it has computed."""

import os
from contextlib import suppress
from typing import NamedTuple

from shoal.comm.agent import in_words, process_fields

COMPUTING = "computing"
_TICKS = os.sysconf("SC_CLK_TCK")


class Look(NamedTuple):
    state: str  # as `in_words` says it; computing when any thread is, or waits for a core
    cpu_s: float  # since the process began; 0.0 where the kernel does not say


def look(pid: int) -> Look:
    fields = process_fields(pid)
    state = in_words(fields)
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0
    with suppress(OSError):
        if state == "asleep" and any(_runs(pid, thread) for thread in os.listdir(f"/proc/{pid}/task")):
            state = COMPUTING
    return Look(state, cpu_s)


def _runs(pid: int, thread: str) -> bool:
    return process_fields(f"{pid}/task/{thread}")[:1] == ["R"]
