"""Agents that the session's agent forks: one more then costs no import, which takes a fresh one some seconds.

The fork is an agent like any other: its own session, its own socket, its own workers, and it is a child of this
process, which sees how it ends."""

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

import cloudpickle

from shoal.comm import agent as agent_process
from shoal.comm.agent import Ended, Said
from shoal.comm.launch import Agent

PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Fork:
    """What the session's agent is sent; the new one's end of its socket follows."""

    def carry_out(self, launcher: Connection, forward: Callable[[Any], None]) -> Ended:
        with socket.socket(fileno=os.dup(launcher.fileno())) as wire:
            _, (file,), _, _ = socket.recv_fds(wire, 1, 1)
        reads, writes = os.pipe()
        between = os.fork()
        if between == 0:
            agent = os.fork()
            if agent == 0:
                os.close(reads)
                os.close(writes)
                launcher.close()
                self._live(file)
            os.write(writes, str(agent).encode())
            os._exit(0)  # the agent is now its launcher's child
        os.waitpid(between, 0)
        forward(Said(0, "result", int(os.read(reads, 20))))
        for each in (reads, writes, file):
            os.close(each)
        return Ended("")

    @staticmethod
    def _live(file: int) -> None:
        code = 1
        try:
            os.setsid()
            sys.argv[1:] = [str(file)]
            agent_process.main()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


@contextmanager
def _adopting() -> Iterator[None]:
    """Processes whose parents end become this one's children."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Adopted:
    """As much of `subprocess.Popen` as a launcher uses, of a child that another process has forked."""

    def __init__(self, pid: int) -> None:
        self.pid, self._lock = pid, threading.Lock()
        self._code: int | None = None
        self._ended = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._ended)

    def poll(self) -> int | None:
        with self._lock:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
            return self._code

    def wait(self, timeout: float | None = None) -> int:
        while (code := self.poll()) is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("agent", timeout or 0.0)
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class ForkedAgent(Agent):
    """A context, as any agent is. Linux only."""

    def __init__(self, stock: Agent) -> None:
        super().__init__()
        self._stock = stock

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair()

        def hand_over(_: Any) -> None:
            with socket.socket(fileno=os.dup(self._stock._connection.fileno())) as wire:
                socket.send_fds(wire, [b"\0"], [theirs.fileno()])

        with theirs, _adopting():
            [pid] = self._stock.carry_out(Fork(), 1, on_start=hand_over)
        self._process: Any = Adopted(pid)
        self._connection = Connection(ours.detach())
        self._connection.send_bytes(cloudpickle.dumps((list(sys.path), os.getcwd(), ())))
        return self
