"""Cores of this host that nobody uses, as the kernel counts them."""

import os
import time
from pathlib import Path

from shoal.cluster.detect import usable_cores

STAT = Path("/proc/stat")
BETWEEN_S = 2.0  # the kernel counts in hundredths of a second; less time says little
_IDLE = (4, 5)  # fields of a processor's line: idle, and idle while a disk works


class FreeCores:
    def __init__(self, stat: Path = STAT) -> None:
        self.stat = stat
        self.allowed = os.sched_getaffinity(0)
        self.idle = 0.0  # over the last time between two looks
        self._last = (time.monotonic(), self._idle_s())

    def look(self, now: float) -> None:
        """Cheap to call often: it reads once in two seconds."""
        began, before = self._last
        if now - began >= BETWEEN_S:
            idle_s = self._idle_s()
            self.idle = max(0.0, idle_s - before) / (now - began)
            self._last = now, idle_s

    def beside(self, workers: int, cores: int) -> float:
        """Idle cores, and no more than the affinity and the quota leave beside workers of so many cores each."""
        return max(0.0, min(self.idle, usable_cores() - workers * cores))

    def _idle_s(self) -> float:
        """Of all processors that this process may use, since the host began; 0.0 where the kernel does not say."""
        try:
            rows = [line.split() for line in self.stat.read_text().splitlines()]
        except OSError:
            return 0.0
        mine = [row for row in rows if row and row[0].startswith("cpu") and row[0][3:].isdigit()]
        ticks = sum(int(row[i]) for row in mine if int(row[0][3:]) in self.allowed for i in _IDLE)
        return ticks / os.sysconf("SC_CLK_TCK")
