"""One worker's account of its steps: when each bucket was handed over, complete and reduced, and what that cost.

An exchange writes down moments as they pass (`Times`); at the end of a step they are turned into seconds of each kind
(`sweep`, pure) and added to the worker's counters. What a worker has counted travels to the others as a row of float64
beside the facts that travel anyway, one step later: no message is sent for it and nobody waits for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shoal.comm.accounting.chrome import bucket_spans, phase_spans
from shoal.comm.accounting.clocks import Offset
from shoal.comm.accounting.counters import Counters, Kind, Place, Tally, Total
from shoal.comm.status import Phase, Reporter

SHOWN_PHASES = 64  # spans of a sampled step that travel; of more, the longest
_BUCKET = 4  # moments of a bucket that travel: posted, ready, begun, reduced
_KINDS = len(Kind)


class Times:
    """Moments of each bucket of one step, in seconds of this host's clock."""

    __slots__ = ("arrived", "begun", "late", "posted", "ready", "reduced")

    def __init__(self, buckets: int, rank: int = 0) -> None:
        self.posted = [0.0] * buckets  # by this worker
        self.ready = [0.0] * buckets  # by the last worker
        self.late = [rank] * buckets  # who that was
        self.arrived = [0.0] * buckets  # all operands were here
        self.begun = [0.0] * buckets  # this worker turned to it
        self.reduced = [0.0] * buckets


def sweep(times: Times, finish: float, tally: Tally) -> float:
    """Add what the buckets cost to the tally; the moment at which the last one was done.

    A moment counts once, for the oldest bucket that was not done: between posted and ready it was waiting, until
    arrived transferring, until begun queued, until reduced reducing. Before ``finish`` the worker computed: hidden.
    After that it stood still: what would be queued then is the time that the news took to get here."""
    cursor = 0.0
    hidden, exposed = tally.hidden, tally.exposed
    for bucket, posted in enumerate(times.posted):
        cursor = max(cursor, posted)
        for kind, until in (
            (Kind.waiting, times.ready[bucket]),
            (Kind.transferring, times.arrived[bucket]),
            (Kind.queued, times.begun[bucket]),
            (Kind.reducing, times.reduced[bucket]),
        ):
            if until <= cursor:
                continue
            if cursor < finish:
                hidden[kind] += min(until, finish) - cursor
            if until > finish:
                seconds = until - max(cursor, finish)
                if kind is Kind.waiting:
                    tally.wait(times.late[bucket], seconds)
                else:
                    exposed[Kind.transferring if kind is Kind.queued else kind] += seconds
            cursor = until
    return cursor


def stand(tally: Tally, asked: float, last: float, late: int, done: float) -> None:
    """The worker stood from ``asked`` to ``done`` for peers of whom ``late`` came last, at ``last``."""
    skew = min(max(last - asked, 0.0), done - asked)
    if skew:
        tally.wait(late, skew)
    tally.spend(Kind.transferring, done - asked - skew, exposed=True)


def sampled(step: int) -> bool:
    """Whether the buckets of a step are told one by one: 2, 5, 10, 20, 50, 100, ..."""
    return step > 1 and str(step).rstrip("0") in ("1", "2", "5")


@dataclass(frozen=True)
class Form:
    """Where what stands in a row."""

    operations: tuple[Place, ...]
    peers: tuple[str, ...]
    buckets: int

    @cached_property
    def width(self) -> int:
        return 2 + len(Phase) + len(self.operations) * (3 + 2 * _KINDS) + len(self.peers) + self.sample_width

    @property
    def sample_width(self) -> int:
        return 4 + self.buckets * _BUCKET + 2 * SHOWN_PHASES

    def read(self, row: np.ndarray) -> "Told":
        values = row.tolist()
        at = 2 + len(Phase)
        phases = tuple(values[2:at])
        totals = []
        for _ in self.operations:
            numbers = values[at : at + 3 + 2 * _KINDS]
            totals.append(
                Total(numbers[0], numbers[1], numbers[2], tuple(numbers[3 : 3 + _KINDS]), tuple(numbers[3 + _KINDS :]))
            )
            at += 3 + 2 * _KINDS
        waits = tuple(values[at : at + len(self.peers)])
        at += len(self.peers)
        sample = None
        begun, finish, done, end = values[at : at + 4]
        if begun:
            moments = values[at + 4 : at + 4 + self.buckets * _BUCKET]
            changes = values[at + 4 + self.buckets * _BUCKET :]
            sample = Sample(
                begun,
                finish,
                done,
                end,
                tuple(zip(*(moments[i::_BUCKET] for i in range(_BUCKET)), strict=True)),
                tuple((Phase(int(p)), t) for p, t in zip(changes[::2], changes[1::2], strict=True) if t),
            )
        return Told(
            int(values[0]), int(values[1]), phases, dict(zip(self.operations, totals, strict=True)), waits, sample
        )


@dataclass(frozen=True)
class Sample:
    """The moments of one worker's step, in seconds of its own clock."""

    begun: float
    finish: float  # backward was over
    done: float  # the mean gradient was there
    end: float  # the next step began
    buckets: tuple[tuple[float, float, float, float], ...]  # posted, ready, begun, reduced
    phases: tuple[tuple[Phase, float], ...]  # (phase, since)


@dataclass(frozen=True)
class Told:
    """What a worker says of itself: everything since it started, and perhaps the moments of its last step."""

    step: int  # the last one that it tells of
    steps: int  # how many since the worker started
    phases: tuple[float, ...]  # seconds by Phase
    totals: dict[Place, Total]  # their `waits` are empty: those are `waits`
    waits: tuple[float, ...]  # exposed seconds by peer, over all operations
    sample: Sample | None


class Account:
    """``operations``: what the exchange does, the reduction of buckets first; equal on all workers.

    ``hosts`` numbers the host of each worker; ``bucket_bytes`` is the size of each bucket of the flat buffer."""

    def __init__(
        self,
        counters: Counters,
        report: Reporter,
        operations: Sequence[Place],
        bucket_bytes: Sequence[int],
        hosts: Sequence[int] = (),
    ) -> None:
        buckets = len(bucket_bytes)
        self.counters, self.bucket_bytes, self.hosts = counters, tuple(bucket_bytes), tuple(hosts)
        self.offsets: dict[int, Offset] = {}  # of workers whose clock is another
        self.latency_s = 0.0  # of the smallest operation, where a transport has measured it
        self.form = Form(tuple(operations), counters.peers, buckets)
        self.now = counters.clock
        self.times = Times(buckets, counters.rank)
        self.tallies = [counters.tally(*place) for place in operations]
        self._report = report
        self._begun = self._finish = self._done = math.inf
        self._steps = 0
        self._shown = 0.0  # up to here the trail has become spans

    # --- moments, as an exchange passes them ------------------------------------------------------------------

    def begin(self) -> list[float]:
        """A step begins; the row that tells of those before it, perhaps shorter than `Form.width`: zeros follow."""
        now = self.now()
        row = self._row(now)
        self._begun, self._finish = now, math.inf
        return row

    def posted(self, bucket: int) -> float:
        """This worker hands a bucket over, now."""
        now = self.now()
        times = self.times
        times.posted[bucket] = times.ready[bucket] = now
        times.late[bucket] = self.counters.rank
        return now

    def peer_posted(self, bucket: int, rank: int, at: float) -> None:
        times = self.times
        if at > times.ready[bucket]:
            times.ready[bucket], times.late[bucket] = at, rank

    def reduces(self, bucket: int, *, in_place: bool = False) -> None:
        """This worker turns to a bucket whose operands are all here, now; ``in_place``: since they were posted."""
        times = self.times
        times.begun[bucket] = now = self.now()
        times.arrived[bucket] = times.ready[bucket] if in_place else now

    def reduced(self, bucket: int) -> None:
        self.times.reduced[bucket] = self.now()

    def finishes(self) -> None:
        """There is nothing left to compute: from now on the worker stands still."""
        self._finish = self.now()

    def settle(self) -> None:
        """The step's buckets are done, and all their moments are known."""
        self._steps += 1
        sweep(self.times, self._finish, self.tallies[0])
        self._done = self.now()
        if self.counters.watchers:
            self._show()

    # --- what becomes of them ---------------------------------------------------------------------------------

    def _row(self, now: float) -> list[float]:
        step = self._report.position.step - 1  # the report is at the step that begins
        row = [float(max(step, 0)), float(self._steps), *self._report.seconds]
        waits = [0.0] * len(self.counters.peers)
        for tally in self.tallies:
            row += [tally.calls, tally.sent_bytes, tally.received_bytes, *tally.hidden, *tally.exposed]
            waits = [a + b for a, b in zip(waits, tally.waits, strict=True)]
        row += waits
        if self._steps and (sampled(step) or self._steps == 3):
            times = self.times
            row += [self._begun, self._finish, self._done, now]
            for moments in zip(times.posted, times.ready, times.begun, times.reduced, strict=True):
                row += moments
            row += _longest([change for change in self._report.trail if self._begun <= change[1] < now], now)
        return row

    def _show(self) -> None:
        """The step as spans, for a recording in this process."""
        spans, times = self.counters.spans, self.times
        changes = [(phase.name, since) for phase, since in self._report.trail if since >= self._shown]
        self._shown = self._done
        spans.extend(phase_spans(changes, self._done))
        operation, link = self.form.operations[0]
        for b in range(self.form.buckets):
            facts = {"operation": operation, "link": link, "last to come": self.counters.peers[times.late[b]]}
            spans.extend(bucket_spans(b, (times.posted[b], times.ready[b], times.begun[b], times.reduced[b]), facts))


def _longest(changes: list[tuple[Phase, float]], end: float) -> list[float]:
    """(phase, since) of the longest spans, in order, flat; the time of one that is left out goes to the one before."""
    if len(changes) > SHOWN_PHASES:
        ends = [*(since for _, since in changes[1:]), end]
        order = sorted(range(len(changes)), key=lambda i: changes[i][1] - ends[i])
        changes = [changes[i] for i in sorted(order[:SHOWN_PHASES])]
    return [float(value) for change in changes for value in change]
