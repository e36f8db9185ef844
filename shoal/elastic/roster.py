"""The files of a run that say who trains it, and who should: both are replaced whole."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shoal.errors import UserError

WORKERS, WANTED = "workers.json", "wanted.json"
HOST = "host:"
LARGEST = 1 << 20  # bytes of a file that is read back


@dataclass(frozen=True)
class Entry:
    """One worker of the epoch that trains now."""

    pid: int
    rank: int
    host: str
    shards: list[int]
    epoch: int


@dataclass(frozen=True)
class Wanted:
    """What somebody asked a running run for. A larger ``number`` is a newer wish."""

    number: int
    workers: int = 0  # 0: leave it
    servers: int = 0
    drain: str = ""  # a rank; HOST and a host's name or number; or "all": the run ends after the step in flight, saved
    why: str = ""


def entries(pids: Sequence[int | None], owned: Sequence[range], host: str, epoch: int) -> list[Entry]:
    """Of the workers by rank, with the shards that each works on; None for those that have ended."""
    return [
        Entry(pid, rank, host, list(shards), epoch)
        for rank, (pid, shards) in enumerate(zip(pids, owned, strict=True))
        if pid is not None
    ]


def write(run: Path, workers: Sequence[Entry]) -> None:
    """A full disk costs the file, not the training."""
    with suppress(OSError):
        _replace(run / WORKERS, json.dumps([asdict(entry) for entry in workers], indent=1))


def read(run: Path) -> list[Entry]:
    """[] when nobody trains the run, or it is not elastic."""
    found = _json(run / WORKERS)
    return [Entry(**entry) for entry in found] if isinstance(found, list) else []


def wish(run: Path, **what: Any) -> Wanted:
    """Leave a wish for the run's agent. Raises UserError when the folder cannot be written."""
    wanted = Wanted(wanted_of(run).number + 1, **what)
    try:
        _replace(run / WANTED, json.dumps(asdict(wanted), indent=1))
    except OSError as error:
        raise UserError(f"cannot write {str(run / WANTED)!r}: {error.strerror}.") from None
    return wanted


def wanted_of(run: Path) -> Wanted:
    found = _json(run / WANTED)
    kinds = {field.name: type(field.default) if field.name != "number" else int for field in fields(Wanted)}
    if not isinstance(found, dict) or "number" not in found:
        return Wanted(0)
    if any(type(value) is not kinds.get(key) for key, value in found.items()):
        return Wanted(0)
    return Wanted(**found)


def _json(file: Path) -> Any:
    try:
        if file.stat().st_size > LARGEST:
            return None
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _replace(file: Path, text: str) -> None:
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_text(text)
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
