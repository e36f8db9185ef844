"""Three agents on this machine, as on three hosts: killed, stopped, thawed and started anew, and not a bit is lost."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic.agents_here import HOSTS, Hosts, alive
from train.tiny_runs import recipe, splits

from shoal.comm.launch import Agent
from shoal.elastic.commands import drain
from shoal.elastic.emulated import train_emulated
from shoal.elastic.hosts import train_on_hosts
from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting
from shoal.run.run import Run

DATA = splits("cnn", 101)
LONG = recipe("cnn", steps=10**6, report=Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False))


@pytest.fixture
def hosts(agent: Agent, tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(agent, tmp_path / "run", LONG, DATA)
    yield made
    made.close()


@pytest.mark.slow
def test_agents_that_are_stopped_killed_and_started_anew_cost_no_bit_and_no_old_worker_commits(hosts, undisturbed):
    for number in range(HOSTS):
        hosts.start(number)
    hosts.trains_on({0, 1, 2}, "the beginning")
    with pytest.raises(UserError, match="is being trained by another process"), Run(hosts.folder).held(True):
        pass

    leader = hosts.leader()
    stopped, other = (number for number in range(HOSTS) if number != leader)
    cut_off = hosts.homes[f"host-{stopped}"]
    os.kill(hosts.pid(stopped), signal.SIGSTOP)  # its worker goes on, and nobody says to it that the others do, too
    hosts.trains_on({leader, other}, "the loss of a stopped agent")
    assert alive(cut_off)
    os.kill(hosts.pid(stopped), signal.SIGCONT)
    hosts.trains_on({0, 1, 2}, "the thaw")
    assert not alive(cut_off), "what was counted as lost has ended, and a new worker has come"

    hosts.kill(other)
    hosts.trains_on({leader, stopped}, "the death of an agent")
    hosts.restart(other)
    hosts.trains_on({0, 1, 2}, "its return")

    drain(hosts.folder, host=f"host-{stopped}")
    hosts.trains_on({leader, other}, "a notice to a host")
    hosts.kill(stopped)
    hosts.restart(stopped)
    hosts.trains_on({0, 1, 2}, "its return, without a loss")

    leader = hosts.leader()
    hosts.kill(leader)
    left = {0, 1, 2} - {leader}
    hosts.trains_on(left, "the death of the leader")
    weights = hosts.drain()

    assert set(hosts.results) == left | ({leader} & set(hosts.results))
    assert all("ended with -9" in why for why in hosts.failures.values())
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
    with pytest.raises(UserError, match="a mesh with tensor = 2 is not elastic yet"):
        train_emulated(LONG, Plan(mesh={"tensor": 2}), hosts=3, **place)
    assert not (tmp_path / "run").exists()
