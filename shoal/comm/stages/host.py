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
from shoal.comm.stages.form import Head, Place
from shoal.comm.stages.messages import Key
from shoal.comm.stages.sockets import SocketMessages

if TYPE_CHECKING:
    from shoal.comm.group import HostGroup

_FREED = 3  # a kind of message, beside those of `SocketMessages`
_NUMBER = struct.Struct("<Q")
SMALL = 1 << 16  # bytes: less is copied with the words


class HostMessages(SocketMessages):
    """See StageMessages."""

    def __init__(self, group: "HostGroup") -> None:
        super().__init__(group, "shared memory")
        self._freed_mesh = group.split([tuple(range(group.world))]).mesh
        self._arenas = group.arenas
        self._told, self._taken = [0] * group.world, [0] * group.world
        self._lent: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # (to, message) -> what the receiver still reads
        self._freed: deque[tuple[int, int]] = deque()  # (origin, message) whose sender is still to be told

    def send(self, to: int, key: Key, values: Mapping[str, Any]) -> None:
        self._tidy()
        super().send(to, key, values)

    def receive(self, origin: int, key: Key) -> dict[str, Any]:
        self._tidy()
        return super().receive(origin, key)

    def take(self, origin: int, key: Key) -> dict[str, Any] | None:
        self._tidy()
        return super().take(origin, key)

    def _placed(self, region: Tensor) -> tuple[Place, Tensor]:
        if region.nbytes < SMALL:
            return None, region
        found = self._arenas.find(region)
        if found is not None:
            return found, region
        with self._arenas.inside():
            copy = region.clone()
        return self._arenas.find(copy), copy

    def _lend(self, to: int, number: int, regions: tuple[Tensor, ...]) -> None:
        if regions:
            self._lent[to, number] = regions

    def _borrowed(self, origin: int, number: int, head: Head) -> dict[int, Tensor]:
        lease = _Lease(self._freed, origin, number)
        return {
            at: self._arenas.lent(*place, view.elements, view.torch_dtype, lease.let_go())
            for at, (view, place) in enumerate(zip(head.views, head.places, strict=True))
            if place is not None
        }

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
        super().settle()


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
