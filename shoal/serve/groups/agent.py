"""``shoal serve`` on a rank above 0: loads its part of the model, and forks a process for each group of rank 0."""

import os
import select
import signal
import socket
import time
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

from shoal.errors import RunFailed, UserError
from shoal.serve.frames import encode
from shoal.serve.groups.agents import End, Ended, Form, FromAgent, Hello, Leave, digest, join, main_port, to_agents
from shoal.serve.groups.mesh import plan_of
from shoal.serve.options import ServeOptions

PATIENCE_S = 300.0  # for rank 0 to load its model, or to come back
AGAIN_S = 0.2


def run_agent(options: ServeOptions) -> int:
    """Until rank 0's server ends: 0. Raises UserError for what cannot be served, and RunFailed when rank 0 is lost."""
    import torch

    from shoal.serve.replica import group_module
    from shoal.serve.target import load
    from shoal.train.weights import weights_sha256

    torch.set_num_threads(1)
    torch.manual_seed(0)
    loaded = load(options.target, options.task, options.dtype, options.name)
    model = digest(loaded.facts, weights_sha256(loaded.model.state_dict()))
    plan = plan_of(options.mesh)
    split = import_module(group_module(loaded.facts["task"])).split(
        loaded.model, plan, loaded.facts, options.engine_options()
    )
    return _Agent(options, plan, split, loaded.facts, model).run()


class _Agent:
    def __init__(self, options: ServeOptions, plan: Any, split: Any, facts: Any, model: str) -> None:
        self._options, self._plan, self._split, self._facts, self._model = options, plan, split, facts, model
        self._rank = int(os.environ["RANK"])
        self._children: dict[int, int] = {}  # pid -> number of its group

    def run(self) -> int:
        wake, woken = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            with self._connected() as rank0:
                rank0.sendall(encode([Hello(self._rank, self._model)]))
                left = self._follow(rank0, wake)
                self._kill(list(self._children))
            if left is not None:
                if left.why:
                    raise UserError(f"serve: {left.why}.")
                return 0

    def _connected(self) -> socket.socket:
        """Rank 0 may still be loading."""
        address, end = os.environ["MASTER_ADDR"], time.monotonic() + PATIENCE_S
        while True:
            try:
                return socket.create_connection((address, main_port()), timeout=5.0)
            except (OSError, RuntimeError):  # the latter of torchrun's store, which does not know it yet
                if time.monotonic() > end:
                    raise RunFailed(f"rank 0 at {address} does not answer since {PATIENCE_S:.0f} s.") from None
                time.sleep(AGAIN_S)

    def _follow(self, rank0: socket.socket, wake: int) -> Leave | None:
        """None when rank 0 is lost."""
        rank0.settimeout(None)
        reader = to_agents()
        poll = select.poll()
        poll.register(rank0, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            ready = {file for file, _ in poll.poll()}
            if wake in ready:
                with suppress(BlockingIOError):
                    os.read(wake, 4096)
                self._reap(rank0)
            if rank0.fileno() not in ready:
                continue
            try:
                data = rank0.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                return None
            for message in reader.feed(data):
                match message:
                    case Form():
                        self._fork(message, rank0)
                    case End():
                        self._kill([pid for pid, number in self._children.items() if number == message.number])
                    case Leave():
                        return message

    def _fork(self, form: Form, rank0: socket.socket) -> None:
        from shoal.serve.replica import run_replica, take_seat

        parent, options = os.getpid(), self._options.engine_options()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            rank0.close()
            meet = partial(join, self._rank, self._plan.workers, form.port)
            life = partial(take_seat, self._split, self._plan, self._facts, options, meet, None)
            run_replica(life, options["threads"], parent)
        self._children[pid] = form.number

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def _reap(self, rank0: socket.socket) -> None:
        while self._children:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            number = self._children.pop(pid, None)
            if number is not None:
                self._tell(rank0, Ended(number))

    def _tell(self, rank0: socket.socket, message: FromAgent) -> None:
        with suppress(OSError):  # the next read says so
            rank0.sendall(encode([message]))
