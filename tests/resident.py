"""By how much the memory of a forked worker grows at most."""

import gc
from collections.abc import Callable
from pathlib import Path

from shoal.comm.freed_memory import give_back_freed_memory


def watch() -> Callable[[], int]:
    """Start to watch; what it gives tells the bytes by which the resident set has grown at most since then.

    A worker inherits the heap of its agent, and what is free in it would be filled first, unseen."""
    gc.collect()
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts from here
    before = _peak_bytes()
    return lambda: _peak_bytes() - before


def _peak_bytes() -> int:
    """Without files: code that is run for the first time is mapped then, and stays."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak, files = (int(status.partition(f"{key}:")[2].split()[0]) << 10 for key in ("VmHWM", "RssFile"))
    return peak - files
