"""Parameter servers on several hosts: a host is lost whole, and no update that a worker has heard of is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic.agents_here import REPORT, STEPS, Hosts, lose_one_and_then_the_leader
from train.tiny_runs import recipe, splits

from shoal.comm.launch import Agent
from shoal.elastic import roster
from shoal.recipe.plan import Plan

DATA = splits("cnn", 101)
RESNET = recipe("resnet", steps=STEPS, clip=0.05, report=REPORT)  # buffers, a norm over all parameters


@pytest.fixture
def hosts(agent: Agent, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    workers, servers = request.param
    plan = Plan(mesh={"data": workers}, device="cpu", sync="parameter-server", servers=servers)
    made = Hosts(agent, tmp_path / "run", RESNET, DATA, plan)
    yield made
    made.close()


def of_server(hosts: Hosts) -> int:
    """A host that a server lives on."""
    return next(int(entry.host[-1]) for entry in roster.read(hosts.folder) if not entry.shards)


RUNS: list[Any] = [pytest.param((2, 1), marks=pytest.mark.slow), pytest.param((3, 3), marks=pytest.mark.soak)]


@pytest.mark.parametrize("hosts", RUNS, indirect=True, ids=["2 and 1", "3 and 3"])
def test_hosts_with_servers_and_the_leaders_are_lost_with_all_their_memory(hosts, undisturbed):
    weights, steps = lose_one_and_then_the_leader(hosts, of_server)
    assert weights == undisturbed(recipe("resnet", steps=steps, clip=0.05, report=REPORT), data=DATA)
