"""Parameter servers on several hosts: a host is lost whole, and no update that a worker has heard of is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic.agents_here import Hosts
from train.tiny_runs import recipe, splits

from shoal.elastic import roster
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting

DATA = splits("cnn", 101)
REPORT = Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False)
STEPS = 10**6
RESNET = recipe("resnet", steps=STEPS, clip=0.05, report=REPORT)  # buffers, a norm over all parameters


@pytest.fixture
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    workers, servers = request.param
    plan = Plan(mesh={"data": workers}, device="cpu", sync="parameter-server", servers=servers)
    made = Hosts(tmp_path / "run", RESNET, DATA, plan)
    yield made
    made.close()


def of_server(hosts: Hosts) -> int:
    """A host that a server lives on."""
    return next(int(entry.host[-1]) for entry in roster.read(hosts.folder) if not entry.shards)


RUNS: list[Any] = [pytest.param((2, 1), marks=pytest.mark.slow), pytest.param((3, 3), marks=pytest.mark.soak)]


@pytest.mark.parametrize("hosts", RUNS, indirect=True, ids=["2 and 1", "3 and 3"])
def test_hosts_with_servers_and_the_leaders_are_lost_with_all_their_memory(hosts, undisturbed):
    for number in range(3):
        hosts.start(number)
    hosts.trains_on({0, 1, 2}, "the beginning")

    lost = of_server(hosts)
    hosts.kill(lost)
    hosts.trains_on({0, 1, 2} - {lost}, "the death of a server with its host")
    hosts.restart(lost)
    hosts.trains_on({0, 1, 2}, "its return, with empty memory")
    leader = hosts.leader()
    hosts.kill(leader)
    hosts.trains_on({0, 1, 2} - {leader}, "the death of the leader")
    weights = hosts.drain()

    steps = [e["step"] for e in hosts.of("committed")]
    assert steps == list(range(1, len(steps) + 1)), "every step is told once, in order"
    assert not hosts.of("resumed"), "what was lost came from peers, not from the disk: there is no checkpoint"
    assert len(hosts.of("recovered")) == 2
    assert all(e["redone"] <= 1 for e in hosts.of("recovered"))
    assert weights == undisturbed(recipe("resnet", steps=len(steps), clip=0.05, report=REPORT), data=DATA)
