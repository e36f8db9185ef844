"""Start workers on this host, inside a block that none of them outlives."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol, Self

from shoal.comm import descriptors
from shoal.comm.agent import END, STOP, Ended, Job, Said
from shoal.errors import RunFailed, UserError

MOST_SERVERS = 64  # processes of one host
GRACE_S = 5.0  # how long an agent may take to leave before it is killed


class Errand(Protocol):
    """What an agent is sent: it travels by pickle, and is carried out over there."""

    def carry_out(self, launcher: Connection, forward: Callable[[Any], None]) -> Ended: ...


class Agent:
    """The launcher's end of an agent process. One agent runs any number of jobs, one after the other.

    It imports torch and the modules named in ``preload`` once; forked workers have them at no cost. A module that
    starts threads when it is imported does not belong there."""

    def __init__(self, preload: Sequence[str] = (), *, within: Sequence[str] = ()) -> None:
        """``within``: a command that runs it in other surroundings, a network namespace say."""
        self._preload, self._within = tuple(preload), tuple(within)

    def __enter__(self) -> Self:
        import cloudpickle

        ours, theirs = socket.socketpair()
        with theirs:
            program = [sys.executable, "-c", "from shoal.comm.agent import main; main()", str(theirs.fileno())]
            self._process = subprocess.Popen(
                [*self._within, *program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is the launcher's to handle
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self._connection = Connection(ours.detach())
        self._connection.send_bytes(cloudpickle.dumps((list(sys.path), os.getcwd(), self._preload)))
        return self

    def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...] = (),
        *,
        workers: int,
        threads: int = 1,
        hang_after_s: float = 120.0,
        servers: int = 0,
        listen: Callable[[int, Any], None] | None = None,
        on_start: Callable[[Callable[[], None]], None] | None = None,
    ) -> list[Any]:
        """Run ``function(group, *arguments)`` in ``workers`` processes, beside ``servers`` parameter servers; the
        workers' results, by rank.

        ``listen(rank, message)`` gets what workers emit. ``on_start`` is handed a function that asks the workers to
        stop after the step in flight; it may be called from a signal handler.
        Raises UserError when a worker found the input unusable, and RunFailed, with the first cause in one line, when a
        worker raised, died or hung."""
        import cloudpickle

        if workers < 1:
            raise UserError(f"a run needs at least 1 worker, got {workers}.")
        if servers > MOST_SERVERS:
            raise UserError(f"{servers} parameter servers on one host: use at most {MOST_SERVERS}, better 1 or 2.")
        descriptors.check(workers, servers)
        program = cloudpickle.dumps((function, arguments))
        job = Job(program, workers, threads, hang_after_s, servers)
        return self.carry_out(job, workers, listen=listen, on_start=on_start)

    def carry_out(
        self,
        job: Errand,
        results: int,
        *,
        listen: Callable[[int, Any], None] | None = None,
        on_start: Callable[[Callable[[], None]], None] | None = None,
    ) -> list[Any]:
        """As `run`, for any kind of job that says itself what the agent does, and that has so many ``results``."""
        import cloudpickle

        self._connection.send_bytes(cloudpickle.dumps(job))
        if on_start:
            on_start(self._ask_stop)
        found: list[Any] = [None] * results
        while True:
            message = self._receive()
            if isinstance(message, Ended):
                if message.user_error:
                    raise UserError(message.failure)
                if message.failure:
                    failure = RunFailed(message.failure)
                    if message.trace:
                        failure.add_note(message.trace)
                    raise failure
                return found
            if message.kind == "result":
                found[message.rank] = message.value
            elif listen:
                try:
                    listen(message.rank, message.value)
                except Exception:
                    self._end_job()
                    raise

    def _receive(self) -> Ended | Said:
        import cloudpickle

        try:
            message: Ended | Said = cloudpickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            raise RunFailed(
                f"the agent of {socket.gethostname()} (pid {self._process.pid}) ended with {code}"
            ) from None
        return message

    def _ask_stop(self) -> None:
        self._connection.send_bytes(STOP)

    def _end_job(self) -> None:
        """End the workers at once, so that the agent is free for the next job."""
        self._connection.send_bytes(END)
        while not isinstance(self._receive(), Ended):
            continue

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._connection.send_bytes(END)  # on purpose: an elastic run goes on when its launcher is only lost
        self._connection.close()  # the agent sees it, kills its workers and leaves
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
