"""How much memory is free at this moment for what processes share."""

import shutil
from pathlib import Path

from shoal.cluster.detect import CGROUP, memory_bytes

MEMINFO, SHM = Path("/proc/meminfo"), Path("/dev/shm")


def free_memory_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes that this process may still take: the smaller of what the machine and the control group have left."""
    free = memory_bytes(cgroup)
    for line in _text(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            free = min(free, int(line.split()[1]) << 10)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        words = _text(cgroup / limit).split(), _text(cgroup / used).split()
        if all(word and word[0].isdigit() for word in words):
            free = min(free, max(0, int(words[0][0]) - int(words[1][0])))
            break
    return free


def dev_shm_bytes(folder: Path = SHM) -> tuple[int, int] | None:
    """(free, all) bytes of /dev/shm; None where there is none. Containers often have 64 MiB."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free, usage.total


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
