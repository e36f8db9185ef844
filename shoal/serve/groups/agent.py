"""The parent of a version's processes on a rank above 0: loads the model, and forks one for each of its groups."""

import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import msgspec

from shoal.errors import ShoalError, UserError
from shoal.serve.control import Start
from shoal.serve.frames import encode
from shoal.serve.groups.agents import Cannot, End, Ended, Form, FromAgent, Hello, digest, join, to_agents
from shoal.serve.groups.broker import Leave
from shoal.serve.groups.hearing import ends_of_children, heard


def main() -> None:
    """``python -c "from shoal.serve.groups.agent import main; main()"``: what to load comes on stdin, and, when it is
    known, the port of its parent at rank 0. It ends with 0 when that parent has ended."""
    start = msgspec.json.decode(sys.stdin.readline(), type=Start)
    sys.path[:] = start.path
    try:
        code = run_agent(start)
    except ShoalError as error:
        print(f"shoal: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    sys.exit(code)


def run_agent(start: Start) -> int:
    """Until its parent at rank 0 ends: 0. Raises UserError for what cannot be served."""
    import torch

    from shoal.comm.agent import die_with_parent
    from shoal.serve.groups.mesh import plan_of
    from shoal.serve.replica import group_module
    from shoal.serve.target import load
    from shoal.train.weights import weights_sha256

    die_with_parent(os.getppid())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plan, rank = plan_of(start.mesh), int(os.environ["RANK"])
    why = ""
    try:
        loaded = load(start.target, start.task, start.dtype, start.name)
        model = digest(loaded.facts, weights_sha256(loaded.model.state_dict()))
        module = import_module(group_module(loaded.facts["task"]))
        split = module.split(loaded.model, plan, loaded.facts, start.options)
    except ShoalError as error:
        why = str(error)
    except Exception as error:  # a user's own factory may raise anything
        why = f"cannot load {start.target!r}: {type(error).__name__}: {error}"
    port = sys.stdin.readline()
    try:
        parent = socket.create_connection((os.environ["MASTER_ADDR"], int(port)))
    except OSError:  # it has gone
        return 0
    with parent:
        if why:
            parent.sendall(encode([Cannot(rank, why)]))
            raise UserError(why)
        parent.sendall(encode([Hello(rank, model)]))
        left = _Agent(start, plan, split, loaded.facts, rank).follow(parent)
    if left is not None and left.why:
        raise UserError(f"serve: {left.why}.")
    return 0


class _Agent:
    def __init__(self, start: Start, plan: Any, split: Any, facts: Any, rank: int) -> None:
        self._start, self._plan, self._split, self._facts, self._rank = start, plan, split, facts, rank
        self._children: dict[int, int] = {}  # pid -> number of its group

    def follow(self, parent: socket.socket) -> Leave | None:
        """None when the parent is lost. No process is left then."""
        try:
            for message in heard(parent, to_agents(), ends_of_children()):
                match message:
                    case None:
                        self._reap(parent)
                    case Form():
                        self._fork(message, parent)
                    case End():
                        self._kill([pid for pid, number in self._children.items() if number == message.number])
                    case Leave():
                        return message
            return None
        finally:
            self._kill(list(self._children))

    def _fork(self, form: Form, parent: socket.socket) -> None:
        from shoal.serve.replica import run_replica, take_seat

        agent, options = os.getpid(), dict(self._start.options)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            parent.close()
            meet = partial(join, self._rank, self._plan.workers, form.port)
            life = partial(take_seat, self._split, self._plan, self._facts, options, meet, None)
            run_replica(life, options["threads"], agent)
        self._children[pid] = form.number

    def _kill(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def _reap(self, parent: socket.socket) -> None:
        while self._children:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            number = self._children.pop(pid, None)
            if number is not None:
                self._tell(parent, Ended(number))

    def _tell(self, parent: socket.socket, message: FromAgent) -> None:
        with suppress(OSError):  # the next read says so
            parent.sendall(encode([message]))
