"""What one worker of a split model counts, over all groups that it is in, and how that reaches the others.

The workers that sum a gradient are a part of the run then, and stages, slices and experts are other parts, each with
`Counters` of its own. Their sum travels beside the norm's row, which goes to all workers anyway, in the steps of which
something will be told: no message is sent for it. As in `account.py`, it tells of the steps before."""

import json
from collections.abc import Callable, Collection, Sequence

from shoal.comm.accounting.account import Told
from shoal.comm.accounting.counters import Counters, Kind, Place, Total
from shoal.comm.accounting.telling import due
from shoal.comm.stages.messages import RECEIVE, SEND
from shoal.comm.status import Reporter

_Key = tuple[int, str, str, int]  # number of the counters; operation, link, thread
_NUMBERS = 3 + 2 * len(Kind)  # of a tally, before the waits


def of_passes(operation: str) -> bool:
    """Whether an operation that is told of belongs to the passes of a split model, not to sums of gradients."""
    return operation in (SEND, RECEIVE) or operation.endswith(")")


class SplitAccount:
    """``counters``: of the group of all workers; those of its parts are found there.

    An operation of those that sum gradients, ``summing``, has its own name, one among others the axes along which its
    workers lie besides, as ``axes_of`` gives them for ranks: "all-reduce (tensor)". Messages of stages need none."""

    def __init__(
        self,
        counters: Counters,
        report: Reporter,
        axes_of: Callable[[Sequence[int]], Sequence[str]],
        summing: Collection[Counters],
    ) -> None:
        self._counters, self._report, self._axes_of = counters, report, axes_of
        self._plain = {each.number for each in (counters, *summing)}
        self._outside: dict[_Key, list[float]] = {}  # counted between steps: evaluation, checkpoints
        self._left: dict[_Key, list[float]] = {}  # as a step left it
        self._open = False
        self._steps = 0
        self._row = b""
        self.told: list[Told] = []  # by rank, what the newest rows say; [] when they say nothing

    def begin(self) -> None:
        """A step begins, or once more."""
        now = self._snapshot()
        if not self._open:
            for key, numbers in now.items():
                before = self._left.get(key)
                if numbers != before:
                    self._outside[key] = _plus(self._outside.get(key), _minus(numbers, before))
        self._open = True
        step = max(self._report.position.step - 1, 0)  # the report is at the step that begins
        self._row = self._packed(step, now) if self._steps and due(step, self._steps) else b""

    def end(self) -> None:
        """The step is committed."""
        self._left, self._open = self._snapshot(), False
        self._steps += 1

    def row(self) -> bytes:
        """What travels with the step under way; b"" for nothing."""
        return self._row

    def heard(self, rows: Sequence[bytes]) -> None:
        """The rows of all workers."""
        self.told = [_told(row) for row in rows] if all(rows) else []

    def _snapshot(self) -> dict[_Key, list[float]]:
        return {
            (counters.number, *key): [t.calls, t.sent_bytes, t.received_bytes, *t.hidden, *t.exposed, *t.waits]
            for counters in self._counters.with_parts()
            for key, t in counters.tallies()
        }

    def _packed(self, step: int, now: dict[_Key, list[float]]) -> bytes:
        everybody = {counters.number: counters for counters in self._counters.with_parts()}
        sums: dict[Place, list[float]] = {}
        waits = [0.0] * len(self._counters.peers)
        for key, numbers in now.items():
            number, operation, link, _ = key
            gained = _minus(numbers, self._outside.get(key))
            counters = everybody[number]
            place = (self._name(operation, counters), link)
            sums[place] = _plus(sums.get(place), gained[:_NUMBERS])
            for peer, seconds in zip(counters.peers, gained[_NUMBERS:], strict=True):
                waits[self._counters.peers.index(peer)] += seconds
        operations = [[*place, *numbers] for place, numbers in sums.items() if any(numbers)]
        return json.dumps([step, self._steps, self._report.seconds, operations, waits]).encode()

    def _name(self, operation: str, counters: Counters) -> str:
        if counters.number in self._plain or operation == "gather":
            return operation
        axes = self._axes_of([self._counters.peers.index(peer) for peer in counters.peers])
        if operation in (SEND, RECEIVE):
            if list(axes) == ["pipe"]:
                return operation
            operation = operation.removeprefix("stage ")  # such messages go round a ring of slices too
        return f"{operation} ({', '.join(axes)})"


def _told(row: bytes) -> Told:
    step, steps, phases, operations, waits = json.loads(row)
    kinds = len(Kind)
    totals = {
        (operation, link): Total(calls, sent, received, tuple(spent[:kinds]), tuple(spent[kinds:]))
        for operation, link, calls, sent, received, *spent in operations
    }
    return Told(step, steps, tuple(phases), totals, tuple(waits), None)


def _minus(numbers: list[float], before: list[float] | None) -> list[float]:
    return numbers if before is None else [a - b for a, b in zip(numbers, before, strict=True)]


def _plus(numbers: list[float] | None, more: list[float]) -> list[float]:
    return more if numbers is None else [a + b for a, b in zip(numbers, more, strict=True)]
