"""The model processes as the HTTP side sees them: their parent, a link to each, and new ones for those that die."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import cast

from shoal.errors import RunFailed, ShoalError, UserError
from shoal.serve.control import (
    Broken,
    Fork,
    FromParent,
    Gone,
    Kill,
    Ready,
    Start,
    from_parent,
)
from shoal.serve.engine import FromEngine, ToEngine
from shoal.serve.frames import FrameError, encode, from_engines
from shoal.serve.options import ServeOptions

MOST_EARLY_DEATHS = 3  # in a row, before a first sign of life
BUFFER_BYTES = 8 << 20  # of a link's socket, so that a batch of bulk requests fits


class Link(asyncio.Protocol):
    """One model process's socket. What is sent in one turn of the event loop leaves as one frame."""

    def __init__(self, number: int, hear: Callable[[int, list[FromEngine]], None], lost: Callable[[int], None]) -> None:
        self.number = number
        self._hear = hear
        self._lost = lost
        self._reader = from_engines()
        self._outgoing: list[ToEngine] = []
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no such class

    def send(self, message: ToEngine) -> None:
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(message)

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.write(encode(self._outgoing))
        self._outgoing = []

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._reader.feed(data)
        except FrameError:
            self.close()  # it talks nonsense: as good as dead
            return
        self._hear(self.number, messages)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lost(self.number)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Replicas:
    """Starts the parent and ``wanted`` model processes of one version of the weights, and keeps their number.

    ``hear`` gets what they say, ``lost`` the number of one whose link has closed. ``leaving`` names those that get no
    more requests, and ``numbers`` gives each process a number of its own."""

    def __init__(
        self,
        options: ServeOptions,
        hear: Callable[[int, list[FromEngine]], None],
        lost: Callable[[int], None],
        leaving: Callable[[], set[int]],
        numbers: Iterator[int],
    ) -> None:
        self.options = options
        self._numbers = numbers
        self.leaving = leaving
        self.wanted = options.replicas
        self.links: dict[int, Link] = {}
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.broken: asyncio.Future[ShoalError] = asyncio.get_running_loop().create_future()
        self._hear_model, self._lost_model = hear, lost
        self._early_deaths = 0
        self._lived: set[int] = set()  # those that have said something
        self._retiring: set[int] = set()
        self._forking = 0
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._control_reader = from_parent()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Starts the parent and goes on: ``ready`` tells when it has loaded the model, ``broken`` why it cannot."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from shoal.serve.parent import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for the verb's result
                start_new_session=True,  # a terminal's Ctrl-C is the HTTP side's to handle
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        o = self.options
        ours.sendall(
            encode([Start(o.target, o.task, o.dtype, o.name, dict(o.mesh), o.engine_options(), tuple(sys.path))])
        )
        ours.setblocking(False)
        self._control, self._control_reader = ours, from_parent()
        self._loop.add_reader(ours, self._read_control, ours)

    def _read_control(self, control: socket.socket) -> None:
        try:
            data = control.recv(1 << 20)
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._close_control()
            self._lost_parent()
            return
        for message in self._control_reader.feed(data):
            self._heard_parent(message)

    def _close_control(self) -> None:
        if self._control is not None:
            self._loop.remove_reader(self._control)
            self._control.close()
            self._control = None

    def _heard_parent(self, message: FromParent) -> None:
        match message:
            case Ready():
                if not self.ready.done():
                    self.ready.set_result(message)
                self.scale(self.wanted)
            case Broken():
                self._break(UserError(message.why) if message.user_error else ShoalError(message.why))
            case Gone():
                self._early_deaths += message.number not in self._lived
                self._lived.discard(message.number)
                if self._early_deaths >= MOST_EARLY_DEATHS:
                    self._break(RunFailed(f"model processes of {self.options.target!r} die as soon as they start."))

    def _break(self, error: ShoalError) -> None:
        if not self.broken.done():
            self.broken.set_result(error)

    def _fork(self) -> None:
        self._forking += 1
        task = self._loop.create_task(self._fork_one())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fork_one(self) -> None:
        self._forking -= 1
        if self._control is None or self._closing:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            number = next(self._numbers)
            with suppress(BrokenPipeError, ConnectionResetError):  # the parent has died: its loss is heard anyway
                socket.send_fds(self._control, [encode([Fork(number)])], [theirs.fileno()])
        ours.setblocking(False)
        link = Link(number, self._hear, self._lost)
        self.links[number] = link
        await self._loop.create_unix_connection(lambda: link, sock=ours)

    def _hear(self, number: int, messages: list[FromEngine]) -> None:
        self._early_deaths = 0
        self._lived.add(number)
        self._hear_model(number, messages)

    def _lost(self, number: int) -> None:
        del self.links[number]
        if self._closing:
            return
        if number in self._retiring:
            self._retiring.discard(number)
            self._lived.add(number)  # it has not died early
            return
        self._lost_model(number)
        if self._control is not None and not self.broken.done():
            self.scale(self.wanted)

    def _lost_parent(self) -> None:
        """Its children die with it. A new one is started, unless it could not even load the model."""
        if self._process is not None:
            self._process.wait()
        if self._closing or self.broken.done():
            return
        if not self.ready.done():
            code = self._process.returncode if self._process else None
            self._break(RunFailed(f"the parent of the model processes ended with {code} while it loaded the model."))
            return
        self.start()

    def scale(self, wanted: int) -> None:
        """Keep so many from now on, beside those that ``leaving`` names: missing ones are forked at once."""
        self.wanted = wanted
        going = self._retiring | self.leaving()
        for _ in range(wanted - len(self.links.keys() - going) - self._forking):
            self._fork()

    def retire(self, number: int) -> None:
        """It has nothing left to do: it ends when its link closes."""
        self._retiring.add(number)
        self.links[number].close()

    def send(self, number: int, message: ToEngine) -> None:
        link = self.links.get(number)
        if link is not None:
            link.send(message)

    def kill(self, number: int) -> None:
        """SIGKILL; the loss is heard as any other."""
        if self._control is not None:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._control.sendall(encode([Kill(number)]))

    def end(self) -> None:
        """Ends all of them, at once."""
        self._closing = True
        for link in list(self.links.values()):
            link.close()
        self._close_control()

    def wait(self) -> None:
        """Until they are gone, after ``end``. May be called from another thread."""
        if self._process is not None:
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
