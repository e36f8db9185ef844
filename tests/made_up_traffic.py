"""What the log of a run says of communication, with seconds that the tests choose: events as a run writes them."""

from collections.abc import Sequence
from typing import Any

from logbook import committed, started

Event = dict[str, Any]
MB = 1_000_000


def comm(
    step: int,
    *,
    compute: Sequence[float] = (0.08, 0.08),
    loading: Sequence[float] = (0.0, 0.0),
    updating: Sequence[float] = (0.0, 0.0),
    waits: Sequence[Sequence[float]] = ((0.0, 0.0), (0.0, 0.0)),
    transferring: float = 0.0,
    hidden: float = 0.0,
    reducing: float = 0.0,
    sent: int = 40 * MB,
    calls: int = 10,
    operation: str = "reduce-scatter",
    link: str = "tcp",
    **more: Any,
) -> Event:
    """One step of every worker: seconds of each, exposed unless it says hidden."""
    workers = len(compute)
    return {
        "step": step,
        "steps": 1,
        "phases": {
            "loading": list(loading),
            "forward": [seconds * 0.4 for seconds in compute],
            "backward": [seconds * 0.6 for seconds in compute],
            "updating": list(updating),
        },
        "operations": [
            {
                "operation": operation,
                "link": link,
                "calls": [calls] * workers,
                "sent": [sent] * workers,
                "received": [sent] * workers,
                "hidden": {"transferring": [hidden] * workers},
                "exposed": {
                    "waiting": [sum(row) for row in waits],
                    "transferring": [transferring] * workers,
                    "reducing": [reducing] * workers,
                },
            }
        ],
        "waits": [list(row) for row in waits],
        **more,
    }


def sample(step: int, workers: int = 2, buckets: int = 3) -> Event:
    """A step of 100 ms whose buckets are handed over from 60 to 80 ms, a millisecond later by each rank."""

    def moments(rank: int, bucket: int) -> list[float]:
        posted = 0.06 + 0.02 * bucket / buckets
        ready = posted + 0.001 * (workers - 1)
        return [posted + 0.001 * rank, ready, ready + 0.001, ready + 0.003]

    phases = [["loading", 0.0], ["forward", 0.01], ["backward", 0.04], ["exchanging", 0.085], ["updating", 0.09]]
    return {
        "step": step,
        "workers": [
            {"rank": rank, "begun": 0.0, "finish": 0.085, "done": 0.09, "end": 0.1, "phases": phases}
            | {"buckets": [moments(rank, bucket) for bucket in range(buckets)]}
            for rank in range(workers)
        ],
    }


def run(
    steps: int = 12,
    seconds: float = 0.1,
    *,
    link: str = "tcp",
    operation: str = "reduce-scatter",
    buckets: int = 10,
    bucket_bytes: int = 4 * MB,
    placement: Sequence[int] = (4, 4),
    latency_s: float = 1e-4,
    **of_each: Any,
) -> list[Event]:
    """Events of a run all of whose steps are alike; each tells of the step before it."""
    transport = {"operation": operation, "link": link, "bucket_bytes": [bucket_bytes] * buckets, "latency_s": latency_s}
    events = [started(steps=steps, placement=list(placement), workers=len(placement), transport=transport)]
    for step in range(1, steps + 1):
        field = comm(step - 1, link=link, operation=operation, calls=buckets, **of_each)
        events.append(committed(step, seconds=seconds, **({"comm": field} if step > 1 else {})))
    return events
