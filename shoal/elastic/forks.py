"""The worker processes of one agent: forked, told, killed and buried."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from shoal.comm.agent import die_with_parent
from shoal.comm.arena import own_file
from shoal.comm.descriptors import make_room
from shoal.comm.status import StatusBoard
from shoal.elastic.process import Program, live
from shoal.elastic.seat import send_order

QUIET_S = 0.2  # how long a killed process may take to end


@dataclass
class Forked:
    pid: int
    pipe: Connection  # what it says
    orders: socket.socket  # what it is told, and a byte back when it is asked to leave
    arena: list[int]
    name: str = "a new worker"
    finished: bool = False  # it said that it ends
    fenced: bool = False  # it was killed as a suspect


class Forks(dict[int, Forked]):
    """By seat. ``close_agents_files`` lets a child go of what is its agent's alone."""

    def __init__(self, program: Program, board: StatusBoard, close_agents_files: Callable[[], None]) -> None:
        super().__init__()
        self._program, self._board, self._close = program, board, close_agents_files

    def fork(self, seat: int) -> int:
        """Its process id."""
        make_room(len(self) + 1)
        ours, theirs = socket.socketpair()
        orders, ordered = socket.socketpair()
        arena = own_file()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with_parent(parent)
            self._close()
            ours.close()
            orders.close()
            for process in self.values():
                self._let_go(process)
            live(self._program, seat, Connection(theirs.detach()), ordered, arena, self._board)
        theirs.close()
        ordered.close()
        self[seat] = Forked(pid, Connection(ours.detach()), orders, arena)
        return pid

    def kill(self, seat: int) -> None:
        with suppress(KeyError, ProcessLookupError):
            os.kill(self[seat].pid, signal.SIGKILL)

    def quiet(self) -> bool:
        """Whether all that were killed as suspects have ended, so that they can write to no memory any more.

        That takes no time, but for one that sleeps in the kernel and cannot be woken: it is not waited for."""
        ends = os.WEXITED | os.WNOWAIT | os.WNOHANG
        last = time.monotonic() + QUIET_S
        for process in self.values():
            while process.fenced and os.waitid(os.P_PID, process.pid, ends) is None:
                if time.monotonic() > last:
                    return False
                time.sleep(0.001)
        return True

    def order(self, seat: int, order: dict[str, Any], files: list[int]) -> None:
        with suppress(KeyError, OSError):  # who has gone is told by its pipe
            send_order(self[seat].orders, order, files)

    def forget(self, seat: int) -> None:
        self._let_go(self.pop(seat))

    def end_all(self) -> None:
        for seat in list(self):
            self.kill(seat)
        for seat in list(self):
            os.waitpid(self[seat].pid, 0)
            self.forget(seat)

    @staticmethod
    def _let_go(process: Forked) -> None:
        process.pipe.close()
        process.orders.close()
        for file in process.arena:
            os.close(file)
