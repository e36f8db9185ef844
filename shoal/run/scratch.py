"""A folder for one command's own files: gone at its end, and where it was killed, with the next one of its kind."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A new folder among the system's temporary ones, for as long as the context is open.

    Folders of the same ``prefix`` whose process was killed are removed first."""
    _sweep(Path(tempfile.gettempdir()), prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as name, (Path(name) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when this process ends, however it does
        lock.write("held\n")
        lock.flush()
        yield Path(name)


def _sweep(place: Path, prefix: str) -> None:
    """Remove folders whose process is gone. One whose lock is empty is in the making."""
    for lock in place.glob(f"{prefix}*/{LOCK}"):
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock.stat().st_size:
                    shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # somebody's own, or at work
            continue
