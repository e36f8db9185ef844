"""What the processes of a group have in common, made before they are forked: sockets, and memory without a name."""

import os
import socket

from shoal.comm.arena import Arenas, arena_files
from shoal.comm.group import HostGroup
from shoal.comm.heap import Heap, anonymous_file, heap_file
from shoal.comm.mesh import Mesh
from shoal.comm.status import Reporter, StatusBoard


class Links:
    """Made in the parent, for one group; each process takes its own, then the parent lets go of all."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._pairs = {(a, b): socket.socketpair() for a in range(world) for b in range(a + 1, world)}
        self._heap, self._arenas = heap_file(), arena_files(world)
        self._board = anonymous_file(StatusBoard.SIZE)

    def taken(self, rank: int) -> HostGroup:
        """In the process that is to be this rank. A peer that dies is an end of file on its socket."""
        peers: list[socket.socket | None] = [None] * self.world
        for (a, b), (left, right) in self._pairs.items():
            for end, owner, peer in ((left, a, b), (right, b, a)):
                if owner == rank:
                    peers[peer] = end
                else:
                    end.close()
        # With the HTTP side there is one process more that wants a core: who waits for a peer is not to spin on it.
        report = Reporter(rank, os.getpid(), StatusBoard(self._board, self.world + 1))
        mesh, heap, arenas = Mesh(rank, peers, report), Heap(self._heap), Arenas(rank, self._arenas)
        return HostGroup(rank, self.world, mesh, report, lambda message: None, heap=heap, arenas=arenas)

    def close(self) -> None:
        for pair in self._pairs.values():
            for end in pair:
                end.close()
        for file in (self._heap, self._board, *self._arenas):
            os.close(file)
