"""The agent: one process of this host that has torch imported, forks the workers, and never outlives its launcher.

The launcher starts it with a socket's number as its only argument. It reads jobs from the launcher's socket, and tells
it what the workers say and how they end. It computes nothing itself, so that forking it is safe and quick.
"""

import ctypes
import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from shoal.comm import descriptors
from shoal.comm.arena import Arenas, arena_files
from shoal.comm.freed_memory import keep_freed_memory
from shoal.comm.group import HostGroup
from shoal.comm.heap import Heap, anonymous_file, heap_file
from shoal.comm.mesh import Mesh, PeerLost
from shoal.comm.native import build
from shoal.comm.status import SERVERS, Phase, Position, Reporter, StatusBoard
from shoal.errors import ShoalError, UserError

WATCH_S = 0.5  # how often the agent looks for workers without progress
STOP, END = b"stop", b"end"  # what a launcher says while a job runs: after the step in flight; at once
FIRST_STEP_PATIENCE = 5  # building, compiling and the first step may take so many times longer


@dataclass(frozen=True)
class Job:
    program: bytes  # cloudpickle of (function, arguments); our own launcher made it
    workers: int
    threads: int
    hang_after_s: float
    servers: int = 0  # parameter servers: processes beside the workers

    @property
    def processes(self) -> int:
        return self.workers + self.servers

    def name(self, rank: int) -> str:
        """Servers are numbered after the workers."""
        return f"rank {rank}" if rank < self.workers else f"server {rank - self.workers}"

    def carry_out(self, launcher: Connection, forward: Callable[[Any], None]) -> "Ended":
        """Called in the agent. ``forward`` hands a worker's message to the launcher."""
        return _run(self, launcher, forward)


@dataclass(frozen=True)
class Said:
    """A worker's message to the launcher: kind is event, result, user_error, failed or lost."""

    rank: int
    kind: str
    value: Any
    trace: str = ""


@dataclass(frozen=True)
class Ended:
    """All workers of the job have ended; ``failure`` is the first cause in one line, "" when there is none."""

    failure: str
    user_error: bool = False
    trace: str = ""


def die_with_parent(parent: int) -> None:
    """Linux: the kernel kills this process when its parent dies, even when the parent could not say goodbye."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it died before we could ask


def process_fields(place: int | str) -> list[str]:
    """What the kernel tells of a process or thread under /proc, from its state on; [] when it has gone."""
    try:
        with open(f"/proc/{place}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def process_state(pid: int) -> str:
    return in_words(process_fields(pid))


def in_words(fields: list[str]) -> str:
    """The state that `process_fields` begin with."""
    if not fields:
        return "state unknown"
    names = {"T": "stopped by a signal", "D": "blocked in the kernel", "S": "asleep", "R": "computing", "Z": "dead"}
    return names.get(fields[0], f"state {fields[0]}")


def killer_of(code: int) -> str:
    """The signal that a process ended by, from its (negative) exit code."""
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name} (out of memory?)" if code == -signal.SIGKILL else name


class Crew:
    """The forked workers of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.host = socket.gethostname()
        self.board_file = anonymous_file(StatusBoard.SIZE)
        self.board = StatusBoard(self.board_file, job.processes)
        self.connections: dict[Connection, int] = {}
        self.pids: dict[int, int] = {}
        self.first_failure: Ended | None = None
        self.finished: set[int] = set()

    def fork(self, launcher: Connection) -> None:
        workers, count = self.job.workers, self.job.processes
        descriptors.make_room(workers, self.job.servers)
        heap, server_heap, own_files = heap_file(), heap_file(), arena_files(workers)
        pairs = {(a, b): socket.socketpair() for a in range(workers) for b in range(a + 1, count)}
        pipes = [socket.socketpair() for _ in range(count)]
        parent = os.getpid()
        gc.freeze()  # keep the collector from copying the parent's pages into every worker
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                die_with_parent(parent)
                launcher.close()
                peers: list[socket.socket | None] = [None] * count
                for (a, b), (left, right) in pairs.items():
                    mine, theirs, peer = (left, right, b) if a == rank else (right, left, a)
                    if rank in (a, b):
                        peers[peer] = mine
                        theirs.close()
                    else:
                        left.close()
                        right.close()
                for other, (ours, theirs) in enumerate(pipes):
                    ours.close()
                    if other != rank:
                        theirs.close()
                shared = Shared(heap, server_heap, own_files, self.board)
                _work(self.job, rank, peers, pipes[rank][1], shared)
            self.pids[rank] = pid
        for left, right in pairs.values():
            left.close()
            right.close()
        for rank, (ours, theirs) in enumerate(pipes):
            theirs.close()
            self.connections[Connection(ours.detach())] = rank
        for file in (heap, server_heap, *own_files):
            os.close(file)

    def position(self, rank: int) -> str:
        return f"{self.job.name(rank)} on {self.host} (pid {self.pids[rank]})"

    def fail(self, line: str, *, user_error: bool = False, trace: str = "") -> None:
        if self.first_failure is None:
            self.first_failure = Ended(line, user_error, trace)

    def on_message(self, said: Said) -> None:
        where = f"{self.position(said.rank)} failed at {self.board.read(said.rank)}"
        if said.kind == "user_error":
            self.fail(said.value, user_error=True)
        elif said.kind == "failed":
            self.fail(f"{where}: {said.value}", trace=said.trace)
        if said.kind in ("result", "user_error", "failed", "lost"):
            self.finished.add(said.rank)

    def on_exit(self, rank: int) -> None:
        _, status = os.waitpid(self.pids[rank], 0)
        code = os.waitstatus_to_exitcode(status)
        at = self.board.read(rank)
        if code < 0:
            self.fail(f"{self.position(rank)} was killed by {killer_of(code)} at {at}")
        elif rank not in self.finished:
            self.fail(f"{self.position(rank)} exited with code {code} at {at}")

    def hung(self) -> str | None:
        """One line naming who hangs and who waits for whom, or None."""
        now = time.monotonic()
        running = [p for p in self.board.all() if p.phase is not Phase.ended and p.pid]
        late = [p for p in running if now - p.since_s > self._patience(p)]
        culprits = [p for p in late if p.phase is not Phase.waiting]
        if not late or (not culprits and len(late) < len(running)):
            return None
        named = culprits or late
        waiting = [p for p in running if p.phase is Phase.waiting and p not in named]
        said = "; ".join(f"{self.position(p.rank)} hangs at {p} since {now - p.since_s:.0f} s ({process_state(p.pid)})"
                         for p in named)  # fmt: skip
        others = ", ".join(f"{self.job.name(p.rank)} is {p}" for p in waiting)
        return said + (f"; {others}" if others else "")

    def _patience(self, position: Position) -> float:
        early = position.step < 1 or position.phase in (Phase.building, Phase.starting)
        return self.job.hang_after_s * (FIRST_STEP_PATIENCE if early else 1)

    def kill(self) -> None:
        for pid in self.pids.values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def failure_of(error: BaseException) -> tuple[str, str, str]:
    """What a worker says of the exception that ended it: kind, value and trace of `Said`."""
    if isinstance(error, UserError):
        return "user_error", str(error), ""
    if isinstance(error, ShoalError):
        line = str(error)
    elif isinstance(error, SystemExit):
        line = f"the program called exit({error.code})"
    else:
        text = " ".join(str(error).split())
        line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return "failed", line, "".join(traceback.format_exception(error))


@dataclass(frozen=True)
class Shared:
    """Memory that the processes of a job share: files without a name, and the page of their positions."""

    heap: int  # of the workers
    server_heap: int  # of workers and servers
    own: list[int]  # each worker's arena
    board: StatusBoard


def _work(job: Job, rank: int, peers: list[socket.socket | None], pipe: socket.socket, shared: Shared) -> NoReturn:
    """The life of a worker or server process, from the fork to its exit."""
    import cloudpickle
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to pass on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connection = Connection(pipe.detach())

    def say(kind: str, value: Any, trace: str = "") -> None:
        connection.send_bytes(cloudpickle.dumps(Said(rank, kind, value, trace)))

    code = 1
    report = Reporter(rank, os.getpid(), shared.board)
    try:
        keep_freed_memory()
        torch.set_num_threads(job.threads)
        if rank < job.workers:
            function, arguments = cloudpickle.loads(job.program)
            say("result", function(_group(job, rank, peers, shared, report, say), *arguments))
        else:
            from shoal.comm.server.shared import serve

            to_workers = Mesh(-1, peers[: job.workers], report)
            serve(rank - job.workers, to_workers, Heap(shared.server_heap), report)
            say("result", None)
        report(Phase.ended)
        code = 0
    except PeerLost as lost:
        say("lost", str(lost))
    except BaseException as error:
        say(*failure_of(error))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _group(
    job: Job,
    rank: int,
    peers: list[socket.socket | None],
    shared: Shared,
    report: Reporter,
    say: Callable[[str, Any], None],
) -> HostGroup:
    mesh, arenas = Mesh(rank, peers[: job.workers], report), Arenas(rank, shared.own)
    heap = Heap(shared.heap)
    group = HostGroup(rank, job.workers, mesh, report, lambda value: say("event", value), heap=heap, arenas=arenas)
    if job.servers:
        group.servers = Mesh(-1, peers[job.workers :], report, first=SERVERS)
        group.server_heap = Heap(shared.server_heap)
    return group


def _run(job: Job, launcher: Connection, forward: Callable[[Any], None]) -> Ended:
    crew = Crew(job)
    crew.fork(launcher)
    try:
        next_watch = time.monotonic() + WATCH_S
        while crew.connections:
            ready = wait([launcher, *crew.connections], timeout=WATCH_S)
            for source in ready:
                assert isinstance(source, Connection)
                if source is launcher:
                    if launcher.recv_bytes() == STOP:  # EOFError when the launcher has gone: nobody to work for
                        crew.board.ask_stop()
                    else:
                        crew.fail("the launcher ended the run")
                    continue
                rank = crew.connections[source]
                try:
                    raw = source.recv_bytes()
                except (EOFError, ConnectionResetError):
                    del crew.connections[source]
                    crew.on_exit(rank)
                    continue
                import cloudpickle

                said: Said = cloudpickle.loads(raw)
                crew.on_message(said)
                if said.kind in ("event", "result") and rank < job.workers:
                    forward(said)
            if time.monotonic() > next_watch:
                next_watch = time.monotonic() + WATCH_S
                line = crew.hung()
                if line:
                    crew.fail(line)
            if crew.first_failure:
                break
        if len(crew.finished) < job.processes:
            crew.fail("workers ended without a result: " + "; ".join(str(p) for p in crew.board.all()))
    finally:
        crew.kill()
        for rank in crew.connections.values():
            os.waitpid(crew.pids[rank], 0)
        os.close(crew.board_file)
    return crew.first_failure or Ended("")


def main() -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # notices are the launcher's to pass on
        signal.signal(number, signal.SIG_IGN)
    launcher = Connection(int(sys.argv[1]))
    import cloudpickle
    import torch  # noqa: F401  (imported once here, inherited by every worker)

    def forward(message: Any) -> None:
        launcher.send_bytes(cloudpickle.dumps(message))

    try:
        sys.path[:], folder, preload = cloudpickle.loads(launcher.recv_bytes())
        os.chdir(folder)
        for module in preload:
            importlib.import_module(module)
        build.kernels()
        build.allocator()
        while True:
            request = launcher.recv_bytes()
            if request not in (STOP, END):  # those came just after the job that they were meant for had ended
                forward(cloudpickle.loads(request).carry_out(launcher, forward))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the launcher has gone, and with it the reason to be here
