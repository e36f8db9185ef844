"""Several hosts played by this machine: an agent for each, which may be killed, stopped, thawed and started anew."""

import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shoal.comm.launch import Agent
from shoal.elastic.api import PRELOAD
from shoal.elastic.crew_of_hosts import HostsJob
from shoal.elastic.hosts import MOST_HOSTS, jobs, listener
from shoal.elastic.network import Direct, Network
from shoal.elastic.promises import kept_lines
from shoal.errors import ShoalError, UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.train.notices import drains

if TYPE_CHECKING:
    from torch import nn


def train_emulated(
    recipe: Recipe,
    plan: Plan,
    *,
    hosts: int,
    run_dir: Path | None = None,
    resume: str | Path | None = None,
    start: str | None = None,
    least: int = 1,
    origins: Mapping[str, str] | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
    model: "Callable[[], nn.Module] | None" = None,
    data: Any = None,
) -> dict[str, Any]:
    """As `shoal.elastic.hosts.train_on_hosts`, with an agent on this machine for each of so many ``hosts``, called
    host-0, host-1, ...

    An agent may be killed, stopped and thawed to see what happens; the result is that of those who are left."""
    check_number(hosts)
    make = jobs(recipe, plan, origins, run_dir, resume, start, model, data, hosts=hosts, least=least)
    with EmulatedHosts(make, Direct(hosts), progress) as emulated, drains() as stop:
        for number in range(hosts):
            emulated.start(number)
        stop.reach(emulated.ask_stop)
        return emulated.result()


def check_number(hosts: int) -> None:
    if not 2 <= hosts <= MOST_HOSTS:
        raise UserError(f"--emulate-hosts {hosts}: use 2 to {MOST_HOSTS}.")


class EmulatedHosts:
    """``make`` gives the job of each host; see `shoal.elastic.hosts.jobs`. At the end of the block all agents end."""

    def __init__(
        self,
        make: Callable[[int, tuple[tuple[str, int], ...], str], HostsJob],
        network: Network,
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.network, self._make, self._listen = network, make, listener(progress)
        self.agents: dict[int, Agent] = {}
        self.results: dict[int, dict[str, Any]] = {}
        self.failures: dict[int, ShoalError] = {}
        self._threads: list[threading.Thread] = []
        self._asks: dict[int, Callable[[], None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for agent in self.agents.values():
            self._end(agent)
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _end(agent: Agent) -> None:
        if agent._process.poll() is None:
            os.kill(agent._process.pid, signal.SIGCONT)
        agent.__exit__(None, None, None)

    def open(self, number: int) -> Agent:
        """An agent for `start` that has imported everything: from then on it takes nobody's time."""
        agent = self._opened(number)
        agent.run(id, workers=1)
        return agent

    def _opened(self, number: int) -> Agent:
        return Agent(PRELOAD, within=self.network.within(number)).__enter__()

    def start(self, number: int, agent: Agent | None = None) -> None:
        """In the place of one that has ended, too."""
        if number in self.agents:
            self._end(self.agents[number])
        self.agents[number] = agent or self._opened(number)
        job = self._make(number, self.network.addresses(number), f"host-{number}")
        self._threads.append(threading.Thread(target=self._carry_out, args=(number, job), daemon=True))
        self._threads[-1].start()

    def _carry_out(self, number: int, job: HostsJob) -> None:
        def on_start(ask: Callable[[], None]) -> None:
            self._asks[number] = ask

        try:
            self.results[number] = self.agents[number].carry_out(job, 1, listen=self._listen, on_start=on_start)[0]
        except ShoalError as error:
            self.failures[number] = error

    def pid(self, number: int) -> int:
        return self.agents[number]._process.pid

    def signal(self, number: int, what: signal.Signals) -> None:
        """To the agent: its workers end with it, and stay when it is only stopped."""
        os.kill(self.pid(number), what)

    def ask_stop(self) -> None:
        for ask in list(self._asks.values()):
            with suppress(OSError):  # its agent has ended
                ask()

    def leader(self, run_dir: Path) -> int:
        """Who led last, by what all agents have kept."""
        terms = [(0, 0)]
        for number in self.agents:
            for line in kept_lines(run_dir / "agents" / f"{number}.log")[1:]:
                terms += [(entry[1], entry[2][1]) for entry in line[3] if entry[2][0] == "Started"]
        return max(terms)[1]

    @property
    def over(self) -> bool:
        """Whether no agent trains any more."""
        return not any(thread.is_alive() for thread in self._threads)

    def result(self) -> dict[str, Any]:
        """Waits for the end. Raises what an agent has raised, when none has a result."""
        for thread in self._threads:
            thread.join()
        if self.results:
            return self.results[min(self.results)]
        raise next((e for e in self.failures.values() if isinstance(e, UserError)), self.failures[min(self.failures)])
