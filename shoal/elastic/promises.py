"""What an agent has promised and holds of the log, in a file of the run: a new process under its number keeps to it.

A line for each change: a checksum and [term, voted, before, entries]. A line that a kill has torn was never acted on.
"""

import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.elastic import frames
from shoal.elastic.consensus import Entry, Keep
from shoal.errors import UserError
from shoal.run.hold import locked


class Promises:
    """``term``, ``voted`` and ``log`` are those that were kept, once opened."""

    def __init__(self, path: Path, agents: int) -> None:
        """Raises UserError when the file cannot be used."""
        self.path = path
        self.term, self.voted = 0, None
        self.log: list[Entry] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                self._open(agents)
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise UserError(f"cannot keep {str(path)!r}: {error.strerror}.") from None

    def _open(self, agents: int) -> None:
        self._lock()
        whole = self._read(agents)
        os.ftruncate(self._file, whole)
        os.lseek(self._file, whole, os.SEEK_SET)
        if not whole:
            self._write([agents])

    def _lock(self) -> None:
        """For as long as this process lives: two agents of one number would break each other's promises."""
        if not locked(self._file):
            raise UserError(
                f"agent {self.path.stem} of the run in {str(self.path.parents[1])!r} is at work already: wait for its "
                f"end, or give this one another --run-dir."
            )

    def _read(self, agents: int) -> int:
        """How many bytes of the file are whole lines."""
        found = _whole_lines(self.path)
        for number, (line, _) in enumerate(found):
            if number == 0 and line != [agents]:
                raise UserError(f"{str(self.path.parent)!r} is of {line[0]} agents, not of {agents}.")
            if number:
                self.term, self.voted, before, entries = line
                self.log[before:] = [frames.read(entry) for entry in entries]
        return found[-1][1] if found else 0

    def keep(self, keep: Keep) -> None:
        """On disk when this returns. Raises OSError."""
        self._write([keep.term, keep.voted, keep.before, [frames.plain(entry) for entry in keep.entries]])

    def _write(self, value: object) -> None:
        text = json.dumps(value, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        if os.write(self._file, line) < len(line):
            raise OSError("the disk is full")
        os.fsync(self._file)

    def close(self, *, forget: bool) -> None:
        """``forget``: the run has ended, and there is nothing to keep to."""
        os.close(self._file)  # of a forked child it lets nothing go: the lock is its agent's
        if forget:
            with suppress(OSError):
                self.path.unlink()
                if not list(self.path.parent.glob("*.log")):  # the last one: what all share goes, too
                    (self.path.parent / "token").unlink(missing_ok=True)
                    self.path.parent.rmdir()


def kept_lines(path: Path) -> list[Any]:
    """What an agent has kept, line by line: first how many agents there are, then each change as it was written.

    [] where there is no such file."""
    try:
        return [line for line, _ in _whole_lines(path)]
    except OSError:
        return []


def _whole_lines(path: Path) -> list[tuple[Any, int]]:
    """Each with the place in the file where it ends."""
    found, end = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        text = line[9:-1]
        if not line.endswith(b"\n") or line[:8] != b"%08x" % zlib.crc32(text):
            break
        end += len(line)
        found.append((json.loads(text), end))
    return found
