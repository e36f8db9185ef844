"""``with shoal.comm.record() as r: step()``: what this process's transports did meanwhile, for loops of one's own."""

import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shoal.comm.accounting import chrome
from shoal.comm.accounting.counters import Counters, Kind, Place, Total, since, total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Recording:
    """Counts of all transports of this process between two moments: Shoal's own, and its backends of torch.distributed.

    Nothing is synchronised for it; what other processes did is not in it. A transfer that is under way at the end
    belongs to nobody."""

    def __init__(self, group: "ProcessGroup | None" = None) -> None:
        self._group = group
        self._before: dict[int, Mapping[Place, Total]] = {}
        self._native: Mapping[Place, Total] = {}
        self._counters: list[Counters] = []
        self._begun = 0.0
        self.seconds = 0.0  # how long the block took
        self.totals: dict[Place, Total] = {}

    def __enter__(self) -> Self:
        self._counters = list(Counters.live)
        for counters in self._counters:
            counters.watchers += 1
            self._before[id(counters)] = counters.totals()
        self._native = group_counters(self._group)
        self._begun = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._begun
        gained: defaultdict[Place, Total] = defaultdict(Total)
        for counters in list(Counters.live):
            for place, gain in since(self._before.get(id(counters), {}), counters.totals()).items():
                gained[place] += gain
        for place, gain in since(self._native, group_counters(self._group)).items():
            gained[place] += gain
        for counters in self._counters:
            counters.watchers -= 1
        self.totals = dict(gained)

    @property
    def exposed_s(self) -> float:
        """Seconds that this worker stood still for communication."""
        return total(self.totals.values()).exposed_s

    @property
    def hidden_s(self) -> float:
        return total(self.totals.values()).hidden_s

    def waits(self) -> dict[str, float]:
        """Seconds that this worker stood still for each peer that had not arrived, the longest first."""
        waited = total(self.totals.values()).waits
        peers = max((counters.peers for counters in self._counters), key=len, default=())
        named = {peers[i] if i < len(peers) else f"rank {i}": seconds for i, seconds in enumerate(waited) if seconds}
        return dict(sorted(named.items(), key=lambda item: -item[1]))

    def table(self) -> str:
        """Operations with their counts, bytes and times, as text."""
        header = ["operation", "link", "calls", "sent", "received", "hidden", "exposed"]
        rows = [[*header, *(kind.name for kind in Kind)]]
        for (operation, link), t in sorted(self.totals.items(), key=lambda item: -item[1].exposed_s):
            times = [t.hidden_s, t.exposed_s, *(t.spent(kind) for kind in Kind)]
            moved = [f"{count / 1e6:.3f} MB" for count in (t.sent_bytes, t.received_bytes)]
            rows.append([operation, link, f"{t.calls:.0f}", *moved, *(f"{seconds * 1e3:.3f} ms" for seconds in times)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for row in rows:
            words = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
            numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(words + numbers))
        return "\n".join(lines)

    def chrome_trace(self, path: str | Path) -> Path:
        """Write what this worker did, moment by moment, for Perfetto. Raises UserError when that cannot be."""
        end = self._begun + self.seconds
        spans = {
            f"rank {counters.rank}": [s for s in counters.spans if s.start_s >= self._begun and s.end_s <= end]
            for counters in self._counters
            if counters.spans
        }
        return chrome.write(spans, Path(path))


def record(group: "ProcessGroup | None" = None) -> Recording:
    """A block whose communication is counted. ``group``: of torch.distributed, if not the default one."""
    return Recording(group)


def group_counters(group: "ProcessGroup | None" = None) -> dict[Place, Total]:
    """What the shm or hier backend of a group of torch.distributed has counted; {} for other backends, or without one.

    ``bytes`` are those of the operations' buffers. Operations that were started asynchronously may have been hidden:
    unless the backend says how long its callers stood, all their time counts as exposed."""
    if "torch.distributed" not in sys.modules:
        return {}
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return {}
    found = group if group is not None else dist.distributed_c10d._get_default_group()
    try:
        backend: Any = found._get_backend(torch.device("cpu"))
    except RuntimeError:  # a group without a backend for processors
        return {}
    if not hasattr(backend, "counters"):
        return {}
    counted = backend.counters().items()
    return {(operation, "shared memory"): native_total(raw, found.size()) for operation, raw in counted}


def native_total(raw: Mapping[str, Any], ranks: int) -> Total:
    """From what the C++ core counts of one operation (OpCounters in native/kernels/shm_types.hpp)."""
    waits = tuple(float(raw["waiting_s"].get(rank, 0.0)) for rank in range(ranks))
    waiting, moving = sum(waits), float(raw["moving_s"])
    stood = min(float(raw.get("standing_s", waiting + moving)), waiting + moving)
    share = stood / (waiting + moving) if waiting + moving > 0 else 0.0
    spent = (0.0, waiting, moving, 0.0)
    return Total(
        calls=float(raw["calls"]),
        sent_bytes=float(raw["bytes"]),
        received_bytes=float(raw["bytes"]),
        hidden=tuple(seconds * (1 - share) for seconds in spent),
        exposed=tuple(seconds * share for seconds in spent),
        waits=tuple(seconds * share for seconds in waits),
    )
