"""What an elastic run leaves to be read: lines of its event log, and who trains it now."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.elastic import roster
from shoal.run.events import EventLog


class Record:
    """Events from before the run directory is there wait. ``forward`` hands each one on, once it has been written."""

    def __init__(self, forward: Callable[[dict[str, Any]], None]) -> None:
        self.run_dir: Path | None = None
        self._forward = forward
        self._log: EventLog | None = None
        self._untold: list[dict[str, Any]] = []

    @property
    def there(self) -> bool:
        return self.run_dir is not None and self.run_dir.is_dir()

    def tell(self, event: Mapping[str, Any]) -> None:
        self._untold.append(dict(event))
        self.tell_what_waits()

    def tell_what_waits(self) -> None:
        if self.run_dir is None or not self.there:
            return
        with suppress(OSError):  # a full disk costs the log, not the training
            self._log = self._log or EventLog(self.run_dir / "events.jsonl")
            for told in self._untold:
                fields = dict(told)
                self._log.write(fields.pop("event"), **fields)
        for told in self._untold:
            self._forward({"time": time.time(), **told, "run_dir": str(self.run_dir)})
        self._untold.clear()

    def write_roster(self, entries: Sequence[roster.Entry]) -> None:
        if self.run_dir is not None and self.there:
            roster.write(self.run_dir, entries)
            self.tell_what_waits()

    def close_log(self) -> None:
        if self._log:
            self._log.close()
            self._log = None

    def end(self) -> None:
        """Nobody trains the run any more."""
        if self.run_dir:
            roster.write(self.run_dir, [])
        self.close_log()
