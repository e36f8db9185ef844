"""A quick look at what communication has to work with on this host, for `shoal doctor`."""

import shutil
from pathlib import Path
from typing import Any

from shoal.cluster.detect import memory_bytes, usable_cores
from shoal.comm.backend.memory import free_memory
from shoal.comm.measuring.cases import IN_PYTHON, Settings
from shoal.comm.measuring.sweep import sweep
from shoal.comm.native import build
from shoal.errors import RunFailed

SIZES = (64 << 10, 4 << 20)  # bytes of the all-reduces that are timed: a short one and a gradient bucket
SECONDS = 0.5


def checkup() -> dict[str, Any]:
    """Facts as plain values. ``all_reduce_s[transport][bytes]``: seconds between 2 ranks, the median; shm only where
    nothing must be compiled for it, shm-python as it is where nothing can be. ``trouble``: why nothing could be timed,
    "" where it could."""
    parts = build.outlook()
    compiled = parts["backend"] == "ready" and build.backend() is not None
    transports = ("gloo", IN_PYTHON, *(("shm",) if compiled else ()))
    seconds: dict[str, dict[int, float]] = {name: {} for name in transports}
    trouble = ""
    settings = Settings(
        workers=2, ops=("all_reduce",), sizes=SIZES, transports=transports, rounds=1, seconds=SECONDS, most=100
    )
    try:
        for row in sweep(settings)["rows"]:
            seconds[row["transport"]][row["bytes"]] = row["latency_s"]
    except RunFailed as failed:
        trouble = str(failed)
    free = free_memory()
    return {
        "parts": parts,
        "all_reduce_s": seconds,
        "trouble": trouble,
        "free_memory_bytes": memory_bytes() if free is None else free,
        "dev_shm_bytes": dev_shm_bytes(),
        "ranks_with_a_core": usable_cores(),
    }


def dev_shm_bytes(folder: Path = Path("/dev/shm")) -> tuple[int, int] | None:
    """(free, all) bytes of /dev/shm; None where there is none. Shoal does without it, other libraries do not:
    containers often have 64 MiB."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free, usage.total
