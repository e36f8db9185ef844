"""A quick look at what communication has to work with on this host, for `shoal doctor`."""

from typing import Any

from shoal.cluster.detect import usable_cores
from shoal.cluster.room import dev_shm_bytes, free_memory_bytes
from shoal.comm.measuring.cases import Settings
from shoal.comm.measuring.sweep import sweep
from shoal.comm.native import build
from shoal.errors import RunFailed

SIZES = (64 << 10, 4 << 20)  # bytes of the all-reduces that are timed: a short one and a gradient bucket
SECONDS = 0.5


def checkup() -> dict[str, Any]:
    """Facts as plain values. ``all_reduce_s[transport][bytes]``: seconds between 2 ranks, the median; shm only where
    nothing must be compiled for it. ``trouble``: why nothing could be timed, "" where it could."""
    parts = build.outlook()
    transports = ("gloo", "shm") if parts["backend"] == "ready" and build.backend() else ("gloo",)
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
    return {
        "parts": parts,
        "all_reduce_s": seconds,
        "trouble": trouble,
        "free_memory_bytes": free_memory_bytes(),
        "dev_shm_bytes": dev_shm_bytes(),
        "ranks_with_a_core": usable_cores(),
    }
