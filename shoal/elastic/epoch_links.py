"""The sockets between hosts that the workers of one epoch have, as the agent of one of the hosts holds them."""

import socket
from contextlib import suppress
from dataclasses import dataclass, field

from shoal.elastic import membership as m
from shoal.elastic.links import Pair


@dataclass
class EpochLinks:
    """As far as they are there: the workers of this host get theirs once all are."""

    form: m.Form
    own: dict[int, int]  # rank -> seat, of those that live here
    missing: set[Pair]
    homes: list[int]  # the host of each rank
    far: dict[Pair, socket.socket] = field(default_factory=dict)
    ordered: bool = False

    def pairs(self, rank: int) -> list[Pair]:
        """Of a worker that lives here, with those that do not."""
        others = [other for other in range(len(self.form.seats)) if other not in self.own]
        return [Pair(self.form.epoch, min(rank, other), max(rank, other)) for other in others]

    def hang_up(self) -> None:
        """All workers that wait on one of these are woken, here and there."""
        for link in self.far.values():
            shut(link)
        self.far.clear()


def shut(link: socket.socket) -> None:
    with suppress(OSError):  # the other end was quicker
        link.shutdown(socket.SHUT_RDWR)  # other processes have it, too
    link.close()
