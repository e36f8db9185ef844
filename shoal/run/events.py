"""The event log of a run: one JSON object a line, appended and never rewritten."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_WAITING = 10_000  # lines


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class EventLog:
    """Appends events; every line holds ``time`` (Unix seconds), ``event`` and, where there is one, ``step``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"  # the last writer was killed in mid-line
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)  # lines that the disk had no room for

    def write(self, event: str, **fields: Any) -> None:
        """Raises OSError when the line cannot be written whole; the log stays readable, and the line is written before
        the next one that can be."""
        self._waiting.append((json.dumps({"time": time.time(), "event": event, **_plain(fields)}) + "\n").encode())
        while self._waiting:
            line = b"\n" + self._waiting[0] if self._torn else self._waiting[0]
            written = os.write(self._file, line)  # one write: lines of several processes never mix
            self._torn = written < len(line) if written else self._torn
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes of an event fitted into {str(self.path)!r}")
            self._waiting.popleft()

    def close(self) -> None:
        os.close(self._file)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of the log; a line torn by a kill is left out, also where a resumed run went on after it."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n") and isinstance(event, dict):
                yield event
