"""The cache folder: files built once, shared by all processes of this machine, and never trusted unchecked."""

import fcntl
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shoal.errors import UserError


def cache_folder() -> Path:
    """$SHOAL_CACHE, else ~/.cache/shoal, else (when the home folder cannot be written) one under the temporary folder.

    Raises UserError when $SHOAL_CACHE is set and cannot be written."""
    if chosen := os.environ.get("SHOAL_CACHE"):
        folder = Path(chosen).expanduser()
        if not _writable(folder):
            raise UserError(
                f"cannot write to the cache folder {chosen!r}: set SHOAL_CACHE to a folder that can be written."
            )
        return folder
    fallback = Path(tempfile.gettempdir()) / f"shoal-cache-{os.getuid()}"
    with suppress(RuntimeError):  # no home folder at all
        home = Path.home() / ".cache" / "shoal"
        if _writable(home):
            return home
    if not _writable(fallback):
        raise UserError(f"cannot write to {str(fallback)!r}: set SHOAL_CACHE to a folder that can be written.")
    return fallback


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cached(name: str, build: Callable[[Path], None], whole: Callable[[Path], bool]) -> Path:
    """The file ``name`` of the cache folder, built by ``build(path)`` unless ``whole(path)`` finds a good one there.

    One process builds, the others wait for it; the file appears by a rename, so none ever sees half of it.
    Raises UserError when the disk is full."""
    folder = cache_folder()
    path = folder / name
    try:
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it however the holder ends
            if path.is_file() and whole(path):
                return path
            handle, partial = tempfile.mkstemp(dir=folder, prefix=f"{name}.")
            os.close(handle)
            try:
                build(Path(partial))
                os.replace(partial, path)
            finally:
                Path(partial).unlink(missing_ok=True)
    except OSError as error:
        text = f"cannot write {name} in the cache folder {str(folder)!r}: {error.strerror}: set SHOAL_CACHE to another."
        raise UserError(text) from None
    return path
