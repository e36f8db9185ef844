"""From the accounts of all workers to what the event log says of communication: compact, by rank, now and then."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shoal.comm.accounting.account import Account, Form, Sample, Told, sampled
from shoal.comm.accounting.clocks import Offset
from shoal.comm.accounting.counters import Kind, Total
from shoal.comm.status import Phase

EVERY_STEP_UP_TO = 10  # after that, one event tells of TOGETHER steps
TOGETHER = 10
MOST_MOMENTS = 2_000  # buckets of all workers in a sample; beyond, only some workers' are told


def due(step: int, steps: int) -> bool:
    """Whether it is time to tell, ``step`` being the last one that is told of, and the ``steps``-th of the session."""
    return step <= EVERY_STEP_UP_TO or step % TOGETHER == 0 or steps <= EVERY_STEP_UP_TO or sampled(step)


class Teller:
    """Makes the ``comm`` of `committed` events: what came to every worker's counts since it last told."""

    def __init__(self, form: Form) -> None:
        """``form``: of the rows that it is called with."""
        self._form = form
        self._last: list[Told] | None = None

    def __call__(self, rows: np.ndarray, offsets: Mapping[int, Offset] | None = None) -> dict[str, Any] | None:
        """The field, or None when it is not yet time. ``rows``: of all workers, [workers, form.width].

        ``offsets``: of the workers whose clock is not rank 0's."""
        step, steps = int(rows[0, 0]), int(rows[0, 1])
        if len(rows) < 2 or not due(step, steps):
            return None
        now = [self._form.read(row) for row in rows]
        if not all(told.steps for told in now):
            return None
        return self.since(now) | self.sample(rows, offsets or {})

    def since(self, now: Sequence[Told]) -> dict[str, Any]:
        """The field without a sample. ``now``: what all workers say."""
        before, self._last = self._last, list(now)
        return _since(before, now)

    def sample(
        self, rows: np.ndarray, offsets: Mapping[int, Offset], names: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """What the field says of one step besides, if anything. ``names``: what the ranks are called in the run."""
        samples = [told.sample for told in map(self._form.read, rows)]
        if len(rows) < 2 or not all(samples):
            return {}
        names = names or range(len(rows))
        return {"sample": _sample(int(rows[0, 0]), [each for each in samples if each], offsets, names)}


def _since(last: Sequence[Told] | None, now: Sequence[Told]) -> dict[str, Any]:
    before = last or [Told(0, 0, (0.0,) * len(Phase), {}, (0.0,) * len(told.waits), None) for told in now]
    phases = {
        phase.name: [seconds(b.phases[phase] - a.phases[phase]) for a, b in zip(before, now, strict=True)]
        for phase in Phase
    }
    operations = []
    for place in dict.fromkeys(place for told in now for place in told.totals):
        gains = [b.totals.get(place, Total()) - a.totals.get(place, Total()) for a, b in zip(before, now, strict=True)]
        if not any(gain.calls or gain.exposed_s for gain in gains):
            continue
        row: dict[str, Any] = {"operation": place[0], "link": place[1]}
        row["calls"] = [int(gain.calls) for gain in gains]
        row["sent"] = [int(gain.sent_bytes) for gain in gains]
        row["received"] = [int(gain.received_bytes) for gain in gains]
        for kept in ("hidden", "exposed"):
            spent = {kind.name: [seconds(getattr(gain, kept)[kind]) for gain in gains] for kind in Kind}
            row[kept] = {name: values for name, values in spent.items() if any(values)}
        operations.append(row)
    return {
        "step": now[0].step,
        "steps": now[0].steps - before[0].steps,
        "phases": {name: values for name, values in phases.items() if any(values)},
        "operations": operations,
        "waits": [
            [seconds(y - x) for x, y in zip(a.waits, b.waits, strict=True)] for a, b in zip(before, now, strict=True)
        ],
    }


def _sample(
    step: int, samples: Sequence[Sample], offsets: Mapping[int, Offset], names: Sequence[int]
) -> dict[str, Any]:
    """The moments of a step, in seconds since the first worker began it. Workers of unknown clocks are left out."""
    every = -(-len(samples) * len(samples[0].buckets) // MOST_MOMENTS)
    shifts = {rank: offsets[rank].seconds if rank in offsets else 0.0 for rank in range(len(samples))}
    known = {rank: shift for rank, shift in shifts.items() if shift is not None and rank % every == 0}
    start = min(samples[rank].begun + shift for rank, shift in known.items())

    def worker(rank: int, sample: Sample, shift: float) -> dict[str, Any]:
        def at(moment: float) -> float:
            return seconds(moment + shift - start)

        told: dict[str, Any] = {
            "rank": names[rank],
            "begun": at(sample.begun),
            "finish": at(sample.finish),
            "done": at(sample.done),
            "end": at(sample.end),
            "buckets": [[at(moment) for moment in bucket] for bucket in sample.buckets],
            "phases": [[phase.name, at(since)] for phase, since in sample.phases],
        }
        if rank in offsets:
            told["clock_error_s"] = seconds(offsets[rank].error_s)
        return told

    return {"step": step, "workers": [worker(rank, samples[rank], shift) for rank, shift in known.items()]}


def transport(account: Account) -> dict[str, Any]:
    """What `started` says of the transport: the first operation, its link, and the buckets that it carries."""
    operation, link = account.form.operations[0]
    facts: dict[str, Any] = {"operation": operation, "link": link, "bucket_bytes": list(account.bucket_bytes)}
    if account.latency_s:
        facts["latency_s"] = seconds(account.latency_s)
    if len(set(account.hosts)) > 1:
        facts["hosts"] = list(account.hosts)
    return facts


def seconds(value: float) -> float:
    """In microseconds: finer is noise."""
    return round(value, 6)
