"""Telling the times of several hosts together, from moments that travel with messages that are sent anyway."""

import math
import os
import socket
from collections import deque
from pathlib import Path

WINDOW = 64  # messages each way that count: clocks drift apart by tens of microseconds a second


def clock_name() -> str:
    """Names the clock that `time.monotonic` reads: processes with the same name read the same one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/time")
    except OSError:
        return socket.gethostname()


class Offset:
    """What to add to a peer's clock to get ours, between bounds that no message may break: none comes before it left.

    Symmetric delays are not assumed: `error_s` is half of what the bounds leave open."""

    def __init__(self) -> None:
        self._most: deque[float] = deque(maxlen=WINDOW)
        self._least: deque[float] = deque(maxlen=WINDOW)

    def received(self, sent: float, arrived: float) -> None:
        """A message that the peer sent at ``sent`` (its clock) was here by ``arrived`` (ours)."""
        self._most.append(arrived - sent)

    def delivered(self, sent: float, arrived: float) -> None:
        """A message that we sent at ``sent`` (our clock) was there by ``arrived`` (the peer's)."""
        self._least.append(sent - arrived)

    @property
    def bounds(self) -> tuple[float, float]:
        return max(self._least, default=-math.inf), min(self._most, default=math.inf)

    @property
    def seconds(self) -> float | None:
        """None as long as messages have gone one way only."""
        least, most = self.bounds
        return (least + most) / 2 if math.isfinite(least) and math.isfinite(most) else None

    @property
    def error_s(self) -> float:
        least, most = self.bounds
        return max(0.0, most - least) / 2
