"""A transport that counts: bytes as they are posted, seconds as they are waited for."""

import time
from collections.abc import Sequence

from shoal.comm.accounting.counters import Kind, Tally
from shoal.comm.transports.contract import Message, Pending, Steps, Transport, drive


class _Timed:
    def __init__(self, pending: Pending, owner: "Counting") -> None:
        self._pending, self._owner = pending, owner

    def wait(self) -> None:
        begun = time.monotonic()
        try:
            self._pending.wait()
        finally:
            self._owner.waited_s += time.monotonic() - begun


class Counting:
    """Another transport, whose bytes go into ``tally``.

    Whether a peer had not arrived or bytes were under way cannot be told without another message: both count as
    transferring. The rest of a run is additions and copies."""

    def __init__(self, transport: Transport, tally: Tally) -> None:
        self._transport, self._tally = transport, tally
        self.rank, self.size, self.lanes = transport.rank, transport.size, transport.lanes
        self.waited_s = 0.0

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Timed:
        sent, received = (sum(m.data.numel() * m.data.element_size() for m in each) for each in (sends, receives))
        self._tally.call(calls=0, sent=sent, received=received)
        return _Timed(self._transport.post(sends, receives), self)

    def worked(self, reduced: int, copied: int) -> None:
        self._transport.worked(reduced, copied)

    def run(self, steps: Steps[None]) -> None:
        """Drive ``steps``, which were made over this transport, as one operation."""
        begun = time.monotonic()
        drive(steps)
        self._tally.call()
        self._tally.spend(Kind.transferring, self.waited_s, exposed=True)
        self._tally.spend(Kind.reducing, time.monotonic() - begun - self.waited_s, exposed=True)
