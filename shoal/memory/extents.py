"""A file without a name, and what lies where in it. It goes when its process goes, however that ends."""

import errno
import os
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from shoal.errors import UserError

PAGE = 4096
GROWTH_BYTES = 64 << 20  # the file grows by so much at once
SPARED = 0.02  # share of a file system that is left free for checkpoints and everybody else


class Extent(NamedTuple):
    start: int
    size: int  # bytes, whole pages


class ExtentFile:
    """Bytes put into a file of temporary life, read back, and their places handed out again.

    Not safe for several threads at once. Growing asks the file system for room first, so that it is full before
    anything has been written, never in the middle; and it leaves SPARED of the file system to others."""

    def __init__(self, folder: str | Path = "") -> None:
        """``folder``: where; "" for the system's folder of temporary files.

        Raises UserError when no file can be made."""
        self.folder = Path(folder or tempfile.gettempdir())
        try:
            self._file = _without_a_name(self.folder)
        except OSError as error:
            raise UserError(
                f"plan: memory.offload_dir = {str(self.folder)!r} cannot hold what is offloaded "
                f"({error.strerror or error}): name a folder that this worker can write to."
            ) from None
        self._end = self._room = 0
        self._free: dict[int, list[int]] = defaultdict(list)  # size -> starts

    @property
    def number(self) -> int:
        """The file's descriptor."""
        return self._file

    @property
    def free_bytes(self) -> int:
        """What may still be put in, beside what is there."""
        system = os.fstatvfs(self._file)
        left = system.f_bavail * system.f_frsize - int(system.f_blocks * system.f_frsize * SPARED)
        return max(0, left) + self._room - self._end

    def reserve(self, size: int) -> Extent:
        """A place for ``size`` bytes. Raises OSError (ENOSPC) when there is no room."""
        size = -(-size // PAGE) * PAGE
        starts = self._free[size]
        if starts:
            return Extent(starts.pop(), size)
        if self._end + size > self._room:
            wanted = self._end + size - self._room
            if self.free_bytes - (self._room - self._end) < wanted:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._grow(wanted)
        start, self._end = self._end, self._end + size
        return Extent(start, size)

    def _grow(self, wanted: int) -> None:
        for size in sorted({wanted, max(wanted, min(GROWTH_BYTES, self.free_bytes // 2))}, reverse=True):
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file, self._room, size)
            except OSError:
                if size == wanted:
                    raise
            else:
                self._room += size
                return

    def release(self, extent: Extent) -> None:
        self._free[extent.size].append(extent.start)

    def write(self, extent: Extent, data: memoryview) -> None:
        """Raises OSError; the extent is the caller's still."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], extent.start + done)

    def read(self, extent: Extent, into: memoryview) -> None:
        """Raises OSError where the file cannot be read whole."""
        done = 0
        while done < len(into):
            count = os.preadv(self._file, [into[done:]], extent.start + done)
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than what was written to it")
            done += count

    def close(self) -> None:
        os.close(self._file)


def _without_a_name(folder: Path) -> int:
    """A file that no path leads to: from the start where the system can, else from at once after it was made."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # some file systems cannot
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    file, name = tempfile.mkstemp(dir=folder)
    os.unlink(name)
    return file
