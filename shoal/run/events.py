"""The event log of a run: one JSON object a line, appended and never rewritten."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class EventLog:
    """Appends events; every line holds at least ``time`` (Unix seconds), ``event`` and, where there is one, ``step``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, event: str, **fields: Any) -> None:
        line = json.dumps({"time": time.time(), "event": event, **_plain(fields)}) + "\n"
        os.write(self._file, line.encode())  # one write: lines of several processes never mix

    def close(self) -> None:
        os.close(self._file)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of the log; a last line torn by a kill is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)
