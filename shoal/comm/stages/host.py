"""Messages between stages on one host: the words over a socket, large tensors read where they lie.

While a stage is `inside` its arena (shoal/comm/arena.py), what it makes lies where all workers of the host can read it.
A message then says only where, and the sender keeps the tensor until the receiver has let go of every view of it, which
the receiver notices by its own memory: when autograd drops the last use, a line goes back. A tensor that is only passed
on is read from the first sender's memory. Everything else (small tensors, a host without the allocator) is copied.
"""

import struct
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shoal.comm.mesh import PeerLost
from shoal.comm.stages.form import Head, Place, pack, raw, region_of, unpack
from shoal.comm.stages.messages import RECEIVE, SEND, Key, Unasked

if TYPE_CHECKING:
    from shoal.comm.group import HostGroup

_WORDS, _PART, _FREED = 1, 2, 3  # kinds of message on the sockets
_NUMBERS = struct.Struct("<QQ")  # number of the message, bytes of its head
_NUMBER = struct.Struct("<Q")
SMALL = 1 << 16  # bytes: less is copied with the words
PART = 16 << 20  # bytes: longer messages go over the socket in pieces of this size


class HostMessages:
    """See StageMessages."""

    def __init__(self, group: "HostGroup") -> None:
        everybody = [tuple(range(group.world))]
        self._mesh, self._freed_mesh = group.split(everybody).mesh, group.split(everybody).mesh
        self._arenas, self._rank = group.arenas, group.rank
        self._clock = group.counters.clock
        self._sends = group.counters.tally(SEND, "shared memory")
        self._receives = group.counters.tally(RECEIVE, "shared memory")
        self._sent, self._heard, self._told, self._taken = ([0] * group.world for _ in range(4))
        self._lent: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # (to, message) -> what the receiver still reads
        self._freed: deque[tuple[int, int]] = deque()  # (origin, message) whose sender is still to be told
        self._unasked = Unasked()
        self.waited_s = 0.0

    def send(self, to: int, key: Key, values: Mapping[str, Any]) -> None:
        self._tidy()
        packed = pack(values)
        placed = [self._placed(region) for region in packed.regions]
        head = Head(key, packed.words, packed.views, tuple(place for place, _ in placed)).encode()
        number = self._sent[to]
        self._sent[to] += 1
        lent = tuple(region for place, region in placed if place is not None)
        if lent:
            self._lent[to, number] = lent
        body = b"".join(raw(region).numpy().tobytes() for place, region in placed if place is None)
        message = _NUMBERS.pack(number, len(head)) + head
        if len(message) + len(body) <= PART:
            message += body
            body = b""
        self._mesh.send(to, _WORDS, number, message)
        for start in range(0, len(body), PART):
            self._mesh.send(to, _PART, number, body[start : start + PART])
        self._sends.call(sent=len(message) + len(body) + sum(region.nbytes for region in lent))

    def _placed(self, region: Tensor) -> tuple[Place, Tensor]:
        """Where others can read a region, and what must live on for that."""
        if region.nbytes < SMALL:
            return None, region
        found = self._arenas.find(region)
        if found is not None:
            return found, region
        with self._arenas.inside():
            copy = region.clone()
        return self._arenas.find(copy), copy

    def receive(self, origin: int, key: Key) -> dict[str, Any]:
        self._tidy()
        return self._unasked.until(origin, key, self._next)

    def take(self, origin: int, key: Key) -> dict[str, Any] | None:
        """As `receive`, without waiting: None when it has not come yet. Raises PeerLost."""
        self._tidy()
        found = self._unasked.kept(origin, key)
        while found is None and (message := self._mesh.take(origin, _WORDS, self._heard[origin])) is not None:
            got, values = self._opened(origin, message)
            if got == key:
                return values
            self._unasked.keep(origin, got, values)
        return found

    def _next(self, origin: int) -> tuple[Key, dict[str, Any]]:
        expected = self._heard[origin]
        message = self._mesh.take(origin, _WORDS, expected)
        if message is None:
            asked = self._clock()
            message = self._mesh.receive(origin, _WORDS, expected)
            stood = self._clock() - asked
            self._receives.wait(origin, stood)
            self.waited_s += stood
        return self._opened(origin, message)

    def _opened(self, origin: int, message: bytes) -> tuple[Key, dict[str, Any]]:
        self._heard[origin] += 1
        number, length = _NUMBERS.unpack_from(message)
        start = _NUMBERS.size + length
        head = Head.decode(memoryview(message)[_NUMBERS.size : start])
        inline = sum(view.nbytes for view, place in zip(head.views, head.places, strict=True) if place is None)
        body = bytearray(memoryview(message)[start:])
        while len(body) < inline:
            body += self._mesh.receive(origin, _PART, number)
        lease = _Lease(self._freed, origin, number) if any(head.places) else None
        tensors, at = [], 0
        for view, place in zip(head.views, head.places, strict=True):
            if place is None:
                tensors.append(view.of(region_of(view, memoryview(body)[at:])))
                at += view.nbytes
            else:
                assert lease is not None
                tensors.append(view.of(self._arenas.lent(*place, view.elements, view.torch_dtype, lease.let_go())))
        lent = sum(view.nbytes for view, place in zip(head.views, head.places, strict=True) if place is not None)
        self._receives.call(received=len(message) + lent + max(0, inline - (len(message) - start)))
        return head.key, unpack(head.words, tensors)

    def _tidy(self) -> None:
        """Tell senders what is no longer read, and let go of what receivers no longer read."""
        while self._freed:
            origin, number = self._freed.popleft()
            with suppress(PeerLost):  # who has gone keeps nothing
                self._freed_mesh.send(origin, _FREED, self._told[origin], _NUMBER.pack(number))
            self._told[origin] += 1
        for to in {to for to, _ in self._lent}:
            with suppress(PeerLost):
                while (said := self._freed_mesh.take(to, _FREED, self._taken[to])) is not None:
                    self._taken[to] += 1
                    del self._lent[to, _NUMBER.unpack(said)[0]]

    def settle(self) -> None:
        self._tidy()
        self._unasked.check_none()


class _Lease:
    """Tells when the last of a message's tensors is no longer read."""

    def __init__(self, freed: deque[tuple[int, int]], origin: int, number: int) -> None:
        self._freed, self._what, self._open = freed, (origin, number), 0

    def let_go(self) -> Callable[[], None]:
        """A function to be called once, when one more tensor is gone."""
        self._open += 1
        return self._one_less

    def _one_less(self) -> None:
        self._open -= 1
        if self._open == 0:
            self._freed.append(self._what)
