"""Three agents on this machine, as on three hosts: killed, stopped, thawed and started anew, and not a bit is lost."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from train.test_processes import until
from train.tiny_runs import recipe, splits

from shoal.comm.launch import Agent
from shoal.elastic import roster
from shoal.elastic.api import PRELOAD
from shoal.elastic.hosts import _free_addresses, train_emulated, train_on_hosts
from shoal.errors import RunFailed, UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting
from shoal.run.events import read_events

DATA = splits("cnn", 101)
LONG = recipe("cnn", steps=10**6, report=Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False))
HOSTS = 3


class Hosts:
    """An agent for each host, and a run that they train together, until it is asked to stop."""

    def __init__(self, folder: Path, run: Any) -> None:
        self.folder, self.recipe = folder, run
        self.addresses = [f"{host}:{port}" for host, port in _free_addresses(HOSTS)]
        self.agents: dict[int, Agent] = {}
        self.threads: list[threading.Thread] = []
        self.results: dict[int, dict[str, Any]] = {}
        self.failures: dict[int, str] = {}

    def start(self, number: int) -> None:
        agent = self.agents[number] = Agent(PRELOAD).__enter__()

        def train() -> None:
            try:
                plan = Plan(mesh={"data": HOSTS}, device="cpu")
                where: dict[str, Any] = {"agents": self.addresses, "number": number, "host": f"host-{number}"}
                self.results[number] = train_on_hosts(
                    self.recipe, plan, run_dir=self.folder, data=DATA, agent=agent, **where
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
        """Host -> process id of its worker, of those that train now."""
        return {entry.host: entry.pid for entry in roster.read(self.folder)}

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


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path / "run", LONG)
    yield made
    for agent in made.agents.values():
        if agent._process.poll() is None:
            os.kill(agent._process.pid, signal.SIGCONT)
        agent.__exit__(None, None, None)
    for thread in made.threads:
        thread.join()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
def test_agents_that_are_stopped_killed_and_started_anew_cost_no_bit_and_no_old_worker_commits(hosts, undisturbed):
    for number in range(HOSTS):
        hosts.start(number)
    hosts.trains_on({0, 1, 2}, "the beginning")

    leader = hosts.leader()
    stopped, other = (number for number in range(HOSTS) if number != leader)
    cut_off = hosts.homes[f"host-{stopped}"]
    os.kill(hosts.pid(stopped), signal.SIGSTOP)  # its worker goes on, and nobody says to it that the others do, too
    hosts.trains_on({leader, other}, "the loss of a stopped agent")
    assert alive(cut_off)
    os.kill(hosts.pid(stopped), signal.SIGCONT)
    hosts.trains_on({0, 1, 2}, "the thaw")
    assert not alive(cut_off), "what was counted as lost has ended, and a new worker has come"

    os.kill(hosts.pid(other), signal.SIGKILL)
    hosts.trains_on({leader, stopped}, "the death of an agent")
    hosts.agents[other].__exit__(None, None, None)
    hosts.start(other)
    hosts.trains_on({0, 1, 2}, "its return")

    os.kill(hosts.pid(leader), signal.SIGKILL)
    left = {0, 1, 2} - {leader}
    hosts.trains_on(left, "the death of the leader")
    roster.wish(hosts.folder, drain="all")
    for thread in hosts.threads:
        thread.join()

    assert set(hosts.results) == left | ({leader} & set(hosts.results))
    assert all("ended with -9" in why for why in hosts.failures.values())
    (weights,) = {result["weights_sha256"] for result in hosts.results.values()}
    steps = [e["step"] for e in hosts.of("committed")]
    assert steps == list(range(1, len(steps) + 1)), "every step is told once, in order"
    epochs = [e["membership"] for e in hosts.events if "membership" in e]
    assert epochs == sorted(epochs)
    entries = [e["entry"] for e in hosts.events if e.get("entry")]  # 0: seen by one agent, and nothing decided
    assert len(entries) == len(set(entries)), "no line is written by two leaders"
    assert len(hosts.of("recovered")) == 3
    assert all(e["redone"] <= 1 for e in hosts.of("recovered"))
    assert all(e["workers"] == 2 for e in hosts.of("recovered"))
    assert json.loads((hosts.folder / "workers.json").read_text()) == []
    shorter = recipe("cnn", steps=len(steps), report=LONG.report)
    assert weights == undisturbed(shorter, data=DATA)


def test_what_cannot_be_on_several_hosts_is_refused_before_anything_is_spent(tmp_path):
    plan, three = Plan(mesh={"data": 2}, device="cpu"), ["127.0.0.1:7001", "127.0.0.1:7002", "127.0.0.1:7003"]
    place: dict[str, Any] = {"run_dir": tmp_path / "run"}
    with pytest.raises(UserError, match="no address: write host:port"):
        train_on_hosts(LONG, plan, agents=[*three, "here"], number=0, **place)
    with pytest.raises(UserError, match="numbered 0 to 2"):
        train_on_hosts(LONG, plan, agents=three, number=3, **place)
    with pytest.raises(UserError, match="an address is there twice"):
        train_on_hosts(LONG, plan, agents=[*three, three[0]], number=0, **place)
    with pytest.raises(UserError, match="add --run-dir"):
        train_emulated(LONG, plan, hosts=3)
    with pytest.raises(UserError, match="--emulate-hosts 1: use 2 to"):
        train_emulated(LONG, plan, hosts=1, **place)
    with pytest.raises(UserError, match="elastic on one host only"):
        train_emulated(LONG, Plan(mesh={"data": 2}, states="zero1"), hosts=3, **place)
    assert not (tmp_path / "run").exists()
