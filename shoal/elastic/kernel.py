"""What the kernel says of a worker: whether it is stopped, asleep or computing, and how much it has computed."""

import os
from contextlib import suppress
from typing import NamedTuple

from shoal.comm.agent import process_state

COMPUTING = "computing"
_TICKS = os.sysconf("SC_CLK_TCK")


class Look(NamedTuple):
    state: str  # as `process_state` says it; computing when any thread is, or waits for a core
    cpu_s: float  # since the process began; 0.0 where the kernel does not say


def look(pid: int) -> Look:
    state, cpu_s = process_state(pid), 0.0
    with suppress(OSError, IndexError, ValueError):
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS
        if state == "asleep" and any(_runs(pid, thread) for thread in os.listdir(f"/proc/{pid}/task")):
            state = COMPUTING
    return Look(state, cpu_s)


def _runs(pid: int, thread: str) -> bool:
    with suppress(OSError, IndexError), open(f"/proc/{pid}/task/{thread}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "R"
    return False
