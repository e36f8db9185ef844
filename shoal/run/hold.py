"""One run directory is trained by one run at a time: two would write over each other's checkpoints."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal.errors import UserError


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Nobody else may hold ``path`` while this context is open and this process alive, however it ends.

    The lock is the directory's own: no file is left behind. A file system without locks is taken as it is.
    Raises UserError when another process holds it."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{str(path)!r} is being trained by another process: wait for its end, or start a new run from one of "
                f"its checkpoints with --from."
            ) from None
        except OSError:
            pass  # NFS without a lock service, say
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_UN)  # closing is not enough: forked children have the same lock open
    finally:
        os.close(folder)
