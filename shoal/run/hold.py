"""One run directory is trained by one run at a time: two would write over each other's checkpoints."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from shoal.errors import UserError


def locked(file: int, how: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file or folder; False where another process has. A file system without locks is taken as it is."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # NFS without a lock service, say
    return True


class Hold:
    """A process's hold on a run directory, until it is closed or the process ends, however it ends.

    ``shared``: with others that say so too, the agents of one run. The lock is the directory's own: no file is left
    behind."""

    def __init__(self, *, shared: bool = False) -> None:
        self._how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._folder = -1
        self._made: list[Path] = []

    def take(self, path: Path, *, make: bool = False) -> None:
        """Nothing is done where it is held already. ``make``: a folder that is not there is made, and goes again with
        the hold unless something has come into it. Raises UserError when another process holds it."""
        if self._folder >= 0:
            return
        try:
            if make:
                self._made = [place for place in (path, *path.parents) if not place.exists()]
                path.mkdir(parents=True, exist_ok=True)
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(f"cannot write the run directory {str(path)!r}: {error.strerror}.") from None
        if not locked(folder, self._how):
            os.close(folder)
            raise UserError(
                f"{str(path)!r} is being trained by another process: wait for its end (`shoal drain` ends an elastic "
                f"run), or start a new run from one of its checkpoints with --from."
            )
        self._folder = folder

    def forget(self) -> None:
        """In a forked child: its parent holds the run."""
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def close(self) -> None:
        if self._folder >= 0:
            for place in self._made:
                with suppress(OSError):  # it is in use
                    place.rmdir()
            with suppress(OSError):
                fcntl.flock(self._folder, fcntl.LOCK_UN)  # a child that somebody has forked may have it open, too
        self.forget()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Nobody else may hold ``path`` while this context is open. Raises UserError when another process does."""
    with closing(Hold()) as hold:
        hold.take(path)
        yield
