"""An agent for each of several hosts on this machine, and a run that they train: killed, stopped, started anew."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked_agents import ForkedAgent
from train.test_processes import until

from shoal.comm.launch import Agent
from shoal.elastic import roster
from shoal.elastic.hosts import train_on_hosts
from shoal.elastic.network import free_addresses
from shoal.errors import RunFailed
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe, Reporting
from shoal.run.events import read_events

HOSTS = 3
STEPS = 10**6  # a run that is asked to stop
REPORT = Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False)  # no disk to come back from


class Hosts:
    """An agent for each host, and a run that they train together, until it is asked to stop."""

    def __init__(
        self, stock: Agent, folder: Path, run: Recipe, data: Any, plan: Plan | None = None, hosts: int = HOSTS
    ) -> None:
        """Their agents are forked by ``stock``."""
        self.stock = stock
        self.folder, self.recipe, self.data = folder, run, data
        self.plan = plan or Plan(mesh={"data": hosts}, device="cpu")
        self.addresses = [f"{host}:{port}" for host, port in free_addresses(hosts)]
        self.agents: dict[int, Agent] = {}
        self.threads: list[threading.Thread] = []
        self.results: dict[int, dict[str, Any]] = {}
        self.failures: dict[int, str] = {}

    def start(self, number: int) -> None:
        agent = self.agents[number] = ForkedAgent(self.stock).__enter__()

        def train() -> None:
            try:
                where: dict[str, Any] = {"agents": self.addresses, "number": number, "host": f"host-{number}"}
                self.results[number] = train_on_hosts(
                    self.recipe, self.plan, run_dir=self.folder, data=self.data, agent=agent, **where
                )
            except RunFailed as failure:
                self.failures[number] = str(failure)

        self.threads.append(threading.Thread(target=train))
        self.threads[-1].start()

    def pid(self, number: int) -> int:
        return self.agents[number]._process.pid

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(read_events(self.folder / "events.jsonl"))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    @property
    def homes(self) -> dict[str, int]:
        """Host -> process id of one of its workers, of those that train now."""
        return {entry.host: entry.pid for entry in roster.read(self.folder)}

    def kill(self, number: int) -> None:
        """The agent, and with it its workers and their memory."""
        os.kill(self.pid(number), signal.SIGKILL)

    def restart(self, number: int) -> None:
        self.agents[number].__exit__(None, None, None)
        self.start(number)

    def drain(self) -> str:
        """End the run; its weights."""
        roster.wish(self.folder, drain="all")
        for thread in self.threads:
            thread.join()
        (weights,) = {result["weights_sha256"] for result in self.results.values()}
        return str(weights)

    def ended_with_nothing_lost(self) -> tuple[str, int]:
        """End a run whose hosts were lost; its weights, after so many steps."""
        weights = self.drain()
        steps = [e["step"] for e in self.of("committed")]
        assert steps == list(range(1, len(steps) + 1)), "every step is told once, in order"
        assert not self.of("resumed"), "what was lost came from peers, not from the disk: there is no checkpoint"
        assert len(self.of("recovered")) == 2
        assert all(e["redone"] <= 1 for e in self.of("recovered"))
        return weights, len(steps)

    def close(self) -> None:
        for agent in self.agents.values():
            if agent._process.poll() is None:
                os.kill(agent._process.pid, signal.SIGCONT)
            agent.__exit__(None, None, None)
        for thread in self.threads:
            thread.join()

    def trains_on(self, hosts: set[int], what: str) -> None:
        names = {f"host-{number}" for number in hosts}
        until(lambda: set(self.homes) == names, what)
        last = self.step
        until(lambda: self.step > last + 2, f"steps after {what}")

    @property
    def step(self) -> int:
        return max((e["step"] for e in self.of("committed")), default=0)

    def leader(self) -> int:
        """Who led last, by what all agents have kept."""
        terms = {}
        for number in self.agents:
            log = self.folder / "agents" / f"{number}.log"
            rows = [json.loads(line[9:]) for line in log.read_text().splitlines()[1:]]
            started = [entry for row in rows for entry in row[3] if entry[2][0] == "Started"]
            terms[number] = max((entry[1], entry[2][1]) for entry in started)
        return max(terms.values())[1]


def follower(hosts: Hosts) -> int:
    """A host whose agent does not lead."""
    leader = hosts.leader()
    return next(number for number in range(HOSTS) if number != leader)


def lose_one_and_then_the_leader(hosts: Hosts, one: Callable[[Hosts], int]) -> tuple[str, int]:
    """Host ``one`` is lost with all its memory and comes back without, then that of the leader is; the weights of the
    run at its end, and how many steps it had."""
    everybody = set(range(HOSTS))
    for number in everybody:
        hosts.start(number)
    hosts.trains_on(everybody, "the beginning")
    lost = one(hosts)
    hosts.kill(lost)
    hosts.trains_on(everybody - {lost}, "the death of a host")
    hosts.restart(lost)
    hosts.trains_on(everybody, "its return, with empty memory")
    leader = hosts.leader()
    hosts.kill(leader)
    hosts.trains_on(everybody - {leader}, "the death of the leader")
    return hosts.ended_with_nothing_lost()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
