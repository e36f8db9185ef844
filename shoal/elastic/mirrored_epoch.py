"""A process's hand on its host's mirror for one epoch, and on the copies that other hosts keep of what it writes."""

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.elastic.mirror import Mirror
from shoal.elastic.peer_copies import PeerCopies
from shoal.elastic.seat import Place
from shoal.train.held_parts import HeldPart


class MirroredEpoch:
    """Made by all processes of an epoch, servers too, which goes on from ``step`` of the mirror, FRESH for nothing.

    ``begins``: the step that a worker stands at, perhaps by a checkpoint; None of a server, which has read none."""

    def __init__(self, mirror: Mirror, place: Place, step: int, begins: int | None) -> None:
        self._mirror, self._server = mirror, place.server >= 0
        self.copies: PeerCopies | None = None
        of_hosts: dict[str, Any] = {}
        if place.copies is not None:
            servers = place.formation.servers
            if servers:
                begins = int(place.copies.gather(b"" if begins is None else str(begins).encode())[0])
            self.copies = copies = PeerCopies(mirror, place.copies, place.homes, servers=servers)
            of_hosts = {"epoch": place.epoch, "wards": copies.wards, "elsewhere": copies.elsewhere}
        mirror.enter(place.rank, len(place.steps), step, begins, **of_hosts)

    def write(self, step: int, parts: Sequence[HeldPart], facts: Mapping[str, Any]) -> None:
        """What this process holds after ``step``; between hosts, what others hold that it keeps the copies of is then
        here, and of a server's there is a copy. Raises PeerLost."""
        written = self._mirror.write(step, parts, facts)
        if self.copies is not None:
            self.copies.send(step, written)
            self.copies.take(step)
            if self._server:
                self.copies.acknowledged(step)
