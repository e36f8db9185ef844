"""Shared memory for a group: without a name, for this user only, and really there before anybody writes to it."""

import fcntl
import os
from pathlib import Path

from shoal.cluster.detect import CGROUP

SPARE_BYTES = 64 << 20  # of the memory that is left, this much is not for buffers
_ADD_SEALS, _SEAL_SHRINK = 1033, 0x2  # fcntl.F_ADD_SEALS and F_SEAL_SHRINK, where Python does not name them


class NoRoom(Exception):
    """The memory cannot be had; says how much was wanted, in one line."""


def megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def free_bytes(meminfo: str, limit: str, used: str, statistics: str) -> int | None:
    """Bytes that this process could still get: of the machine and of its control group (texts of their files, "" if
    there is none), whose cache of files gives way. None when nothing says so."""
    rooms = []
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            rooms.append(int(value.split()[0]) * 1024)
    if limit.strip().isdigit() and used.strip().isdigit():
        kept = dict(line.split() for line in statistics.splitlines() if len(line.split()) == 2)
        cached = int(kept.get("inactive_file", kept.get("total_inactive_file", "0")))
        rooms.append(int(limit) - int(used) + cached)
    return min(rooms, default=None)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def free_memory(cgroup: Path = CGROUP) -> int | None:
    if (cgroup / "memory.max").exists():
        parts = [cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat"]
    else:
        folder = cgroup / "memory"
        parts = [folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes", folder / "memory.stat"]
    return free_bytes(_text(Path("/proc/meminfo")), *map(_text, parts))


def reserved_file(total: int, reserved: int) -> int:
    """A memory file of ``total`` bytes whose first ``reserved`` are backed; its descriptor. Raises NoRoom."""
    wanted = f"{megabytes(reserved)} of shared memory are wanted"
    free = free_memory()
    if free is not None and reserved + SPARE_BYTES > free:
        raise NoRoom(f"{wanted}, {megabytes(max(0, free))} are free")
    try:
        file = os.memfd_create("shoal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise NoRoom(f"{wanted}, and none can be made: {error.strerror}") from None
    try:
        os.fchmod(file, 0o600)
        os.ftruncate(file, total)
        os.posix_fallocate(file, 0, reserved)
        fcntl.fcntl(file, _ADD_SEALS, _SEAL_SHRINK)  # nobody can take away what others have mapped
    except OSError as error:
        os.close(file)
        raise NoRoom(f"{wanted}, and the kernel refuses: {error.strerror}") from None
    return file
