"""Messages between stages over sockets: words and tensors alike, copied on their way."""

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shoal.comm.stages.form import Head, Place, pack, raw, region_of, unpack
from shoal.comm.stages.messages import RECEIVE, SEND, Key, Unasked

if TYPE_CHECKING:
    from shoal.comm.group import HostGroup
    from shoal.comm.wired import WiredGroup

_WORDS, _PART = 1, 2  # kinds of message on the sockets
_NUMBERS = struct.Struct("<QQ")  # number of the message, bytes of its head
PART = 16 << 20  # bytes: longer messages go over the socket in pieces of this size


class SocketMessages:
    """See StageMessages: between workers of several hosts. ``link`` is what carries them, as counters call it."""

    def __init__(self, group: "HostGroup | WiredGroup", link: str = "sockets") -> None:
        self._mesh = group.split([tuple(range(group.world))]).mesh
        self._clock = group.counters.clock
        self._sends, self._receives = group.counters.tally(SEND, link), group.counters.tally(RECEIVE, link)
        self._sent, self._heard = [0] * group.world, [0] * group.world
        self._unasked = Unasked()
        self.waited_s = 0.0

    # --- what a host's shared memory makes of it --------------------------------------------------------------

    def _placed(self, region: Tensor) -> tuple[Place, Tensor]:
        """Where the receiver can read a region, if anywhere, and what must live on for that."""
        return None, region

    def _lend(self, to: int, number: int, regions: tuple[Tensor, ...]) -> None:
        """A message's regions that the receiver reads where they lie."""

    def _borrowed(self, origin: int, number: int, head: Head) -> dict[int, Tensor]:
        """Regions of a message that lie in the sender's memory, by their number in it."""
        return {}

    # --- there and back ---------------------------------------------------------------------------------------

    def send(self, to: int, key: Key, values: Mapping[str, Any]) -> None:
        packed = pack(values)
        placed = [self._placed(region) for region in packed.regions]
        head = Head(key, packed.words, packed.views, tuple(place for place, _ in placed)).encode()
        number = self._sent[to]
        self._sent[to] += 1
        lent = tuple(region for place, region in placed if place is not None)
        self._lend(to, number, lent)
        body = b"".join(raw(region).numpy().tobytes() for place, region in placed if place is None)
        message = _NUMBERS.pack(number, len(head)) + head
        if len(message) + len(body) <= PART:
            message += body
            body = b""
        self._mesh.send(to, _WORDS, number, message)
        for start in range(0, len(body), PART):
            self._mesh.send(to, _PART, number, body[start : start + PART])
        self._sends.call(sent=len(message) + len(body) + sum(region.nbytes for region in lent))

    def receive(self, origin: int, key: Key) -> dict[str, Any]:
        return self._unasked.until(origin, key, self._next)

    def take(self, origin: int, key: Key) -> dict[str, Any] | None:
        """As `receive`, without waiting: None when it has not come yet. Raises PeerLost."""
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
        borrowed = self._borrowed(origin, number, head)
        tensors, at = [], 0
        for place, view in enumerate(head.views):
            if place in borrowed:
                tensors.append(view.of(borrowed[place]))
            else:
                tensors.append(view.of(region_of(view, memoryview(body)[at:])))
                at += view.nbytes
        self._receives.call(received=_NUMBERS.size + length + sum(view.nbytes for view in head.views))
        return head.key, unpack(head.words, tensors)

    def settle(self) -> None:
        self._unasked.check_none()
