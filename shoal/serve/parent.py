"""The parent of the model processes: imports torch and loads the model once, then forks whoever is asked for.

It computes nothing, so that a fork of it is quick and safe: a new model process takes milliseconds, not seconds, and
its weights are the memory that all the others map. It leaves when the HTTP side's socket closes, and its children
with it."""

import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

from shoal.comm.freed_memory import give_back_freed_memory
from shoal.serve.control import (
    Broken,
    Fork,
    FromParent,
    Gone,
    Kill,
    Ready,
    Start,
    to_parent,
)
from shoal.serve.frames import encode
from shoal.serve.groups.agents import Agents, End, Form, digest, free_port, join
from shoal.serve.groups.broker import Broker, Leave, Load
from shoal.serve.groups.mesh import several_hosts

SILENT_S = 10.0  # while ranks are missing
MOST_FDS = 16  # that may come with one read


def main() -> None:
    """``python -c "from shoal.serve.parent import main; main()" FD``"""
    begun = time.monotonic()
    Parent(socket.socket(fileno=int(sys.argv[1])), begun).run()


class Parent:
    def __init__(self, control: socket.socket, begun: float) -> None:
        self._control = control
        self._begun = begun
        self._reader = to_parent()
        self._fds: list[int] = []
        self._children: dict[int, int] = {}  # pid -> number; those of a group have one number
        self._first_end: dict[int, int] = {}  # number -> how the first process of a group ended
        self._loaded: Any = None
        self._split: Any = None  # None: whole models
        self._plan: Any = None
        self._options: dict[str, Any] = {}
        self._agents: Any = None  # of other hosts; None: there are none
        self._broker: Any = None  # by which they find this parent
        self._ready: Ready | None = None  # to be said when all of them are there
        self._newer = False  # another version is served already
        self._told_missing = False
        self._wanted: dict[int, int] = {}  # number -> link of a group that is to be forked once they are

    def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            poll = select.poll()
            poll.register(wake, select.POLLIN)
            for each in (self._control, *self._sockets()):
                poll.register(each, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(self._tells_after_ms())}
            if not ready and self._agents:
                print(f"shoal: waiting for ranks {self._agents.missing} of {self._plan.workers}", flush=True)
                self._told_missing = True
            if wake in ready:
                with suppress(BlockingIOError):
                    os.read(wake, 4096)
                self._reap()
            if self._broker:
                self._agents.look(ready)
                self._broker.look(ready)
            if self._control.fileno() in ready and not self._read():
                if self._broker:
                    self._agents.tell(Leave(""))
                    self._broker.leave()
                return

    def _sockets(self) -> Iterator[socket.socket]:
        if self._broker:
            yield from self._agents.sockets()
            yield from self._broker.sockets()

    def _read(self) -> bool:
        """False when the HTTP side has gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 1 << 16, MOST_FDS)
        except ConnectionResetError:
            return False
        self._fds += fds
        for message in self._reader.feed(data):
            match message:
                case Start():
                    self._start(message)
                case Fork():
                    self._fork(message.number, self._fds.pop(0))
                case Kill():
                    self._kill(message.number)
        return bool(data)

    def _tells_after_ms(self) -> float | None:
        """How long nobody hears that ranks are missing; None: nothing is to be told."""
        return 1e3 * SILENT_S if self._agents and self._agents.missing and not self._told_missing else None

    def _kill(self, group: int | None) -> None:
        """The processes of this host of a group; None: of all."""
        for pid, number in self._children.items():
            if group is None or number == group:
                os.kill(pid, signal.SIGKILL)

    def _say(self, message: FromParent) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has gone: the next read says so
            self._control.sendall(encode([message]))

    def _start(self, order: Start) -> None:
        sys.path[:] = order.path
        from shoal.errors import ShoalError, UserError

        try:
            import torch

            from shoal.comm.agent import die_with_parent
            from shoal.comm.native import build
            from shoal.serve.groups.mesh import plan_of
            from shoal.serve.replica import engine_module, group_module
            from shoal.serve.target import fitted, load
            from shoal.serve.weights import share_weights

            die_with_parent(os.getppid())
            torch.set_num_threads(1)
            torch.manual_seed(0)
            self._plan = plan_of(order.mesh)
            if several_hosts():  # the others load at the same time
                self._agents = Agents(self._plan.workers, self._all_here, self._kill, self._refused)
                wanted = Load(self._agents.port, order.target, order.task, order.dtype, order.name)
                self._broker = Broker(wanted, self._plan.workers - 1)
                self._newer = self._broker.newer
            imported = time.monotonic()
            self._loaded = load(order.target, order.task, order.dtype, order.name)
            loaded = time.monotonic()
            if order.dtype == "auto":
                self._loaded = fitted(self._loaded, order.options["batch"], order.options["threads"])
            fitted_at = time.monotonic()
            model, facts = self._loaded.model, self._loaded.facts
            if self._agents:
                from shoal.train.weights import weights_sha256

                self._agents.model = digest(facts, weights_sha256(model.state_dict()))
            if self._plan.splits_model:
                self._split = import_module(group_module(facts["task"])).split(model, self._plan, facts, order.options)
                weights = self._split.bytes
                build.ranks()  # looked up (which asks the compiler's version), and loaded, once for all that are forked
            else:
                weights = share_weights(model)
                import_module(engine_module(facts["task"])).prepare(model, order.options)
        except ShoalError as error:
            self._say(Broken(str(error), isinstance(error, UserError)))
            return
        except Exception as error:  # a user's own factory may raise anything
            self._say(Broken(f"cannot load {order.target!r}: {type(error).__name__}: {error}", False))
            return
        self._options = dict(order.options)
        gc.collect()
        gc.freeze()  # a collection in a child would touch, and so copy, every page of the parent's objects
        give_back_freed_memory()
        seconds = {
            "import": imported - self._begun,
            "load": loaded - imported,
            **({"precision": fitted_at - loaded} if order.dtype == "auto" else {}),
            "share": time.monotonic() - fitted_at,
        }
        self._ready = Ready(self._loaded.facts, seconds, weights)
        if not self._agents:
            self._all_here()

    def _all_here(self) -> None:
        """What waited for the agents of the other hosts."""
        self._told_missing = False  # who is lost from now on is told of again
        if self._ready is not None:
            self._say(self._ready)
            self._ready = None
        wanted, self._wanted = self._wanted, {}
        for number, link in wanted.items():
            self._fork(number, link)

    def _refused(self, why: str) -> None:
        """An agent cannot take part: what is served stays. Where nothing is yet, the agent's own rank says why."""
        if self._newer and self._ready is not None:
            self._say(Broken(why, True))

    def _fork(self, number: int, link: int) -> None:
        if self._agents and self._agents.missing:
            self._wanted[number] = link
            return
        from shoal.serve.groups.links import Links
        from shoal.serve.replica import run_replica, serve_model, take_seat

        parent, world, port = os.getpid(), self._plan.workers, 0
        links = Links(world) if world > 1 and not self._agents else None
        if self._agents:
            port = free_port()
            self._agents.tell(Form(number, port))
        for rank in range(1 if self._agents else world):
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for held in (self._control, *self._sockets()):  # who is at their other ends hears when this one ends
                    held.close()
                asks = socket.socket(fileno=link)
                facts, options = self._loaded.facts, self._options
                if self._split is None:
                    life = partial(serve_model, self._loaded.model, facts, options, asks)
                else:
                    meet = partial(links.taken, rank) if links else partial(join, rank, world, port)
                    life = partial(take_seat, self._split, self._plan, facts, options, meet, asks)
                run_replica(life, options["threads"], parent)
            self._children[pid] = number
        os.close(link)
        if links:
            links.close()

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            number = self._children.pop(pid, None)
            if number is None:
                continue
            first = self._first_end.setdefault(number, os.waitstatus_to_exitcode(status))
            left = [other for other, its in self._children.items() if its == number]
            for other in left:  # a group ends as one
                os.kill(other, signal.SIGKILL)
            if self._agents:
                self._agents.tell(End(number))
            if not left:
                del self._first_end[number]
                self._say(Gone(number, first))
