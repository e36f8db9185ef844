"""Effects on files: hashed writing, checked reading, and folders that appear whole or not at all."""

import errno
import hashlib
import itertools
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from shoal.train.checkpoint_manifest import StoredFile

_COUNT = itertools.count()
_TEMPORARY = re.compile(r"\.(writing|removing)-.+-([0-9a-f]{8})-(\d+)-(\d+)-\d+")
_FOREIGN_DEAD_AFTER_S = 24 * 3600.0


def write_hashed(path: Path, pieces: Iterable[memoryview | bytes], chunk_bytes: int) -> StoredFile:
    """Write the pieces one after another, hash each chunk in the same pass, and fsync. Raises OSError."""
    hashes: list[str] = []
    digest, size = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while len(view):
                part = view[: chunk_bytes - size % chunk_bytes]
                digest.update(part)
                _write_all(file, part)
                size += len(part)
                view = view[len(part) :]
                if size % chunk_bytes == 0:
                    hashes.append(digest.hexdigest())
                    digest = hashlib.sha256()
        if size % chunk_bytes:
            hashes.append(digest.hexdigest())
        os.fsync(file)
    finally:
        os.close(file)
    return StoredFile(path.name, size, tuple(hashes))


def _write_all(file: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(file, data) :]


def broken_chunks(path: Path, stored: StoredFile, chunk_bytes: int) -> Iterator[int]:
    """Numbers of the chunks whose bytes are not those that were written. Raises OSError."""
    scratch = memoryview(bytearray(min(chunk_bytes, stored.bytes)))
    with path.open("rb", buffering=0) as file:
        for number, said in enumerate(stored.sha256):
            start = number * chunk_bytes
            size = min(chunk_bytes, stored.bytes - start)
            view = scratch[:size]
            got = 0
            while got < size and (count := file.readinto(view[got:])):
                got += count
            if got < size or hashlib.sha256(view).hexdigest() != said:
                yield number


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder last through a power cut. File systems that cannot are left in peace."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def temporary(folder: Path, verb: str, name: str) -> Path:
    """A hidden sibling's name that says which process owns it: machine and boot, process id, its start time."""
    return folder / f".{verb}-{name}-{_machine()}-{os.getpid()}-{_started(os.getpid())}-{next(_COUNT)}"


def remove_folder(folder: Path) -> None:
    """Take a folder away at once under its own name, then delete it: a kill in between leaves no half of it.

    Raises OSError when it cannot be taken away; what then cannot be deleted is left for ``clear_leftovers``."""
    hidden = temporary(folder.parent, "removing", folder.name.lstrip("."))
    with suppress(FileNotFoundError):  # another process removed it first
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Delete temporary folders that a removal left, and those whose writer is dead. A writer of another machine,
    container or boot cannot be asked: it counts as dead when nothing in its folder changed for a day.
    Other files are never touched."""
    for entry in folder.iterdir():
        owner = _TEMPORARY.fullmatch(entry.name)
        if owner and (owner[1] == "removing" or _is_dead(entry, owner[2], int(owner[3]), owner[4])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_dead(entry: Path, machine: str, pid: int, started: str) -> bool:
    if machine == _machine():
        return _started(pid) != started
    with suppress(OSError):
        newest = max(item.stat().st_mtime for item in (entry, *entry.iterdir()))
        return time.time() - newest > _FOREIGN_DEAD_AFTER_S
    return False


def _machine() -> str:
    """Differs between hosts, boots and process-id namespaces: within it, a process id and start time are unique."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; "" when it does not run (a zombie does not)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:  # no /proc on this system: the process id alone must do
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "0"
