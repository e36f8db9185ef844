"""What the samples of a load say: percentiles, answers a second, and whether the clients themselves were the limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.serve.load.client import Sample

QUANTILES = (50.0, 90.0, 99.0, 99.9)
CURVE = (0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.99, 100.0)  # of the plot
LATE_S = 0.01  # a client that sends so long after a request was due, at its 99th percentile, is short of time itself


@dataclass(frozen=True)
class Seen:
    """All that the client processes of one load wrote down."""

    samples: Sequence[Sample]
    gaps: Sequence[float]  # seconds between two events of a stream
    cpu_s: float  # of the client processes


def percentile(ordered: Sequence[float], share: float) -> float:
    """``ordered`` rises; ``share`` is from 0 to 100. The smallest value that so large a share is at or below."""
    return ordered[min(len(ordered) - 1, max(0, -int(-len(ordered) * share // 100) - 1))]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """In milliseconds, by name: "p50", ..., "max"; of no values there are none."""
    if not values:
        return {}
    ordered = sorted(values)
    return {f"p{q:g}": 1e3 * percentile(ordered, q) for q in QUANTILES} | {"max": 1e3 * ordered[-1]}


def slope(times: Sequence[float]) -> float:
    """Answers a second, as the line through (time, answers so far): a batch that falls on an edge does not matter."""
    ordered = sorted(times)
    middle, half = sum(ordered) / len(ordered), (len(ordered) - 1) / 2
    spread = sum((at - middle) ** 2 for at in ordered)
    return sum((at - middle) * (i - half) for i, at in enumerate(ordered)) / spread if spread else 0.0


def _rate(ends: Sequence[float], seconds: float) -> float:
    """Answers that lie close together, as one batch's do, make no line."""
    if len(ends) > 2 and max(ends) - min(ends) > seconds / 2:
        return slope(ends)
    return len(ends) / seconds


def figures(seen: Seen, warm_s: float, seconds: float, open_loop: bool) -> dict[str, Any]:
    """Of the requests of the ``seconds`` after the first ``warm_s``.

    Open loop: those that were due then, each timed from when it was due. Closed loop: those that were answered then,
    timed from when they were sent; how long a client would have waited that a slow server kept from asking, no closed
    loop can tell. A refusal, a failure or no answer has no place among the latencies of answers, but in "all_ms"."""
    until = warm_s + seconds
    inside = [s for s in seen.samples if warm_s <= (s.due if open_loop else s.end) < until]
    good = [s for s in inside if s.status == 200]
    ends = [s.end for s in seen.samples if s.status == 200 and warm_s < s.end <= until]
    statuses: dict[str, int] = {}
    for sample in inside:
        statuses[str(sample.status)] = statuses.get(str(sample.status), 0) + 1
    refused = [s for s in inside if s.status == 429]
    late = percentiles([s.sent - s.due for s in inside])
    latencies = sorted(s.end - s.due for s in good)
    told: dict[str, Any] = {
        "seconds": seconds,
        "asked": len(inside),
        "asked_a_second": len(inside) / seconds,
        "ok": len(good),
        "ok_a_second": _rate(ends, seconds),
        "refused": len(refused),
        "refused_with_time": sum(s.told_when for s in refused),
        "failed": len(inside) - len(good) - len(refused),
        "statuses": dict(sorted(statuses.items())),
        "ms": percentiles(latencies),
        "all_ms": percentiles([s.end - s.due for s in inside]),
        "curve_ms": [[q, 1e3 * percentile(latencies, q)] for q in CURVE] if latencies else [],
        "late_ms": late,
        "client_is_short": open_loop and late.get("p99", 0.0) > 1e3 * LATE_S,
        "client_cpu_s": seen.cpu_s,
    }
    streams = [s for s in good if s.first]
    if streams:
        told |= {
            "tokens_a_second": sum(s.tokens for s in streams) / seconds,
            "first_ms": percentiles([s.first - s.due for s in streams]),
            "gap_ms": percentiles(seen.gaps),
        }
    return told
