"""Programs of Python in forks of one process that has imported what they use: milliseconds where a fresh interpreter
takes seconds. `Program` stands for `subprocess.Popen`, and runs what ``python -c`` and ``python -m`` would run."""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from io import TextIOBase
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

MOST_BYTES = 1 << 18  # of an order: it holds a whole environment
OUT_OF_THE_WAY = 512  # where descriptors that have come wait for their places


class Source:
    """The process that is forked. It ends when nobody holds the other end of its socket any more.

    Of ``modules``, which it imports, the ``starters`` start programs by ``subprocess.Popen``: in forks they fork.
    Modules that are ``absent`` cannot be imported there."""

    def __init__(self, modules: Sequence[str], starters: Sequence[str] = (), absent: Sequence[str] = ()) -> None:
        self._words = [",".join(starters), ",".join(absent), *modules]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def fork(self, order: Mapping[str, Any], descriptors: Sequence[int]) -> tuple[int, socket.socket]:
        """(pid, where how it ends is told)"""
        with self._lock:
            if self._process is None:
                self._process = self._started()
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._orders, [json.dumps(order).encode()], [theirs.fileno(), *descriptors])
        pid = ours.recv(32)
        assert pid, "the process that is forked has ended"
        return int(pid), ours

    def _started(self) -> "subprocess.Popen[bytes]":
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            return subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *self._words],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **paths, "OPENBLAS_NUM_THREADS": "1"},  # NumPy's would start threads at once
            )

    def close(self) -> None:
        if self._process is not None:
            self._orders.close()
            self._process.wait(60)


class Program:
    """``python -c CODE ...`` or ``python -m MODULE ...``: in a fork of the source, or where there is none, of this."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        source: Source | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        pass_fds: Sequence[int] = (),
        text: bool = False,
        start_new_session: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        assert command[0] == sys.executable, "a program of Python"
        assert command[1] in ("-c", "-m")
        streams: list[Any] = []
        theirs: list[int] = []
        opened: list[int] = []
        for number, given in enumerate((stdin, stdout, stderr)):
            stream = None
            if given == subprocess.PIPE:
                read, write = os.pipe()
                end, ours = (read, write) if number == 0 else (write, read)
                stream = os.fdopen(ours, ("w" if number == 0 else "r") + ("" if text else "b"))
                opened.append(end)
            elif given == subprocess.DEVNULL:
                end = os.open(os.devnull, os.O_RDWR)
                opened.append(end)
            else:
                end = number if given is None else given
            theirs.append(end)
            streams.append(stream)
        self.stdin, self.stdout, self.stderr = streams
        order = {
            "command": list(command[1:]),
            "places": [0, 1, 2, *pass_fds],
            "session": start_new_session,
            "env": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
        }
        self.returncode: int | None = None
        descriptors = [*theirs, *pass_fds]
        self._told: socket.socket | None = None
        if source is not None:
            self.pid, self._told = source.fork(order, descriptors)
        else:
            gc.collect()  # what would be collected in the fork closes descriptors there
            self.pid = os.fork()
            if self.pid == 0:
                _become(order, descriptors)
        for end in opened:
            os.close(end)

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is not None:
            return self.returncode
        ends = os.pidfd_open(self.pid) if self._told is None else self._told.fileno()
        try:
            wait = select.poll()
            wait.register(ends, select.POLLIN)
            if not wait.poll(None if timeout is None else 1e3 * timeout):
                raise subprocess.TimeoutExpired("python", timeout or 0.0)
        finally:
            if self._told is None:
                os.close(ends)
        if self._told is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        else:
            self.returncode = int(self._told.recv(32) or b"1")
            self._told.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """What comes through its pipes until it has ended, whoever else holds them: a full one would hold it up."""
        last = None if timeout is None else time.monotonic() + timeout
        out, err = b"", b""
        while self.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self.wait(0.02)
            out, err = out + _there(self.stdout), err + _there(self.stderr)
            if self.returncode is None and last is not None and time.monotonic() > last:
                raise subprocess.TimeoutExpired("python", timeout or 0.0)
        return _ended(self.stdout, out), _ended(self.stderr, err)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, and the word of that is on the way
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[str], source: Source, cwd: str | Path | None = None, timeout: float = 600.0
) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run`, with all output captured."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        program = Program(command, source=source, stdout=out.fileno(), stderr=err.fileno(), cwd=cwd)
        try:
            code = program.wait(timeout)
        except subprocess.TimeoutExpired:
            program.kill()
            raise
        for each in (out, err):
            each.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def _there(stream: Any) -> bytes:
    """What nobody has read yet."""
    found = b""
    if stream is not None:
        os.set_blocking(stream.fileno(), False)
        with suppress(BlockingIOError):
            while data := os.read(stream.fileno(), 1 << 16):
                found += data
    return found


def _ended(stream: Any, found: bytes) -> Any:
    """All that came, with what is still there; the stream is closed."""
    if stream is None:
        return None
    with stream:
        found += _there(stream)
    return found.decode() if isinstance(stream, TextIOBase) else found


def with_forks(module: ModuleType, source: Source | None = None) -> Any:
    """The module's ``subprocess`` with `Program` as its Popen."""
    return SimpleNamespace(**{**vars(module.subprocess), "Popen": partial(Program, source=source)})


def _become(order: Mapping[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """What a fresh interpreter would be."""
    import fcntl

    gc.freeze()  # what this process has inherited is nobody's to collect
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if order["session"]:
        os.setsid()
    aside = [fcntl.fcntl(each, fcntl.F_DUPFD, OUT_OF_THE_WAY) for each in descriptors]
    for each, place in zip(aside, order["places"], strict=True):
        os.dup2(each, place)
    kept = set(order["places"])
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with suppress(OSError):
                os.close(int(name))
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["folder"])
    paths = order["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = ["", *filter(None, paths), *sys.path]
    kind, what, *arguments = order["command"]
    code: Any = 0
    try:
        sys.argv = [kind, *arguments]
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as left:
        code = left.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(int(code or 0))


def _serve(orders: socket.socket) -> None:
    """Forks whoever is ordered, and tells how each ends; until the last who may order is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    told: dict[int, socket.socket] = {}
    while True:
        wait = select.poll()
        for each in (wake, orders.fileno()):
            wait.register(each, select.POLLIN)
        ready = {each for each, _ in wait.poll()}
        if wake in ready:
            os.read(wake, 4096)
            for pid in list(told):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with suppress(OSError), told.pop(pid) as to:
                        to.send(b"%d" % os.waitstatus_to_exitcode(status))
        if orders.fileno() in ready:
            data, descriptors, _, _ = socket.recv_fds(orders, MOST_BYTES, 64)
            if not data:
                return
            tell, *theirs = descriptors
            pid = os.fork()
            if pid == 0:
                _become(json.loads(data), theirs)
            told[pid] = socket.socket(fileno=tell)
            told[pid].send(b"%d" % pid)
            for each in theirs:
                os.close(each)


if __name__ == "__main__":
    number, starters, absent, *names = sys.argv[1:]
    sys.modules.update(dict.fromkeys(filter(None, absent.split(","))))  # type: ignore[arg-type]
    for name in names:
        import_module(name)
    for name in filter(None, starters.split(",")):
        starter = import_module(name)
        starter.subprocess = with_forks(starter)  # type: ignore[attr-defined]
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a fork has the thread that forks alone"
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(number)))
