"""``shoal serve`` on a rank above 0: starts an agent for each parent of rank 0, and again when one dies."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress

import msgspec

from shoal.errors import RunFailed
from shoal.serve.control import Start
from shoal.serve.frames import encode
from shoal.serve.groups.broker import AGAIN_S, Host, Leave, Load, broker_address, to_hosts
from shoal.serve.groups.hearing import ends_of_children, heard
from shoal.serve.options import ServeOptions

PATIENCE_S = 300.0  # for rank 0 to begin, or to come back
REFUSED = 2  # how an agent ends that cannot serve what it was told to


def run_host(options: ServeOptions) -> int:
    """Until rank 0's server ends: 0, or 2 when what this host has cannot be served. Raises RunFailed when rank 0 is
    lost."""
    host = _Host(options)
    try:
        return host.run()
    finally:
        host.end()


class _Host:
    def __init__(self, options: ServeOptions) -> None:
        self._options, self._rank = options, int(os.environ["RANK"])
        self._agents: dict[subprocess.Popen[str], Load] = {}
        self._first = Load(0, options.target, options.task, options.dtype, options.name)
        # loads what this host was started with; wanted by nobody yet
        self._loading: subprocess.Popen[str] | None = None

    def run(self) -> int:
        wake = ends_of_children()
        self._loading = self._spawn(self._first)
        while True:
            with self._connected() as broker:
                broker.sendall(encode([Host(self._rank)]))
                code = self._follow(broker, wake)
            if code is not None:
                return code

    def _connected(self) -> socket.socket:
        """The broker may not be there yet, or another one take its place."""
        end = time.monotonic() + PATIENCE_S
        while True:
            with suppress(OSError, RuntimeError):  # the latter of torchrun's store
                address = broker_address()
                if address is not None:
                    return socket.create_connection(address, timeout=5.0)
            if time.monotonic() > end:
                raise RunFailed(f"rank 0 at {os.environ['MASTER_ADDR']} does not answer since {PATIENCE_S:.0f} s.")
            time.sleep(AGAIN_S)

    def _follow(self, broker: socket.socket, wake: int) -> int | None:
        """How this host ends; None when the broker is lost."""
        broker.settimeout(None)
        for message in heard(broker, to_hosts(), wake):
            match message:
                case None:
                    if self._reap():
                        return REFUSED
                case Load():
                    self._start(message)
                case Leave():
                    return 0
        return None

    def _start(self, load: Load) -> None:
        if load in self._agents.values():
            return
        agent, self._loading = self._loading, None
        if agent is None or msgspec.structs.replace(load, port=0) != self._first:
            agent, self._loading = self._spawn(load), agent
        self._agents[agent] = load
        assert agent.stdin
        with suppress(BrokenPipeError):  # it has died: that is seen
            agent.stdin.write(f"{load.port}\n")
            agent.stdin.flush()

    def _spawn(self, load: Load) -> "subprocess.Popen[str]":
        o = self._options
        start = Start(load.target, load.task, load.dtype, load.name, dict(o.mesh), o.engine_options(), tuple(sys.path))
        agent = subprocess.Popen(
            [sys.executable, "-c", "from shoal.serve.groups.agent import main; main()"],
            stdin=subprocess.PIPE,
            stdout=2,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert agent.stdin
        agent.stdin.write(msgspec.json.encode(start).decode() + "\n")
        agent.stdin.flush()
        return agent

    def _reap(self) -> bool:
        """Agents come in the place of those that have died. True: there was one, and it cannot serve."""
        for agent in [agent for agent in self._agents if agent.poll() is not None]:
            load = self._agents.pop(agent)
            if agent.returncode == REFUSED and not self._agents:
                return True
            if agent.returncode not in (0, REFUSED):
                self._start(load)
        if self._loading is not None and self._loading.poll() is not None:
            self._loading = self._spawn(self._first)
        return False

    def end(self) -> None:
        for agent in (*self._agents, *filter(None, (self._loading,))):
            agent.kill()
            agent.wait()
