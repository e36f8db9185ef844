"""Stages of a pipeline on several hosts: a host is lost whole, and its stages are made again from their copies."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from elastic.agents_here import REPORT, STEPS, Hosts, follower, lose_one_and_then_the_leader
from train.test_processes import until
from train.tiny_runs import recipe, splits

from shoal.comm.launch import Agent
from shoal.recipe.plan import Plan

IMAGES, WORDS = splits("cnn", 101), splits("gpt", 101)
DATA: dict[str, Any] = {"resnet": IMAGES, "gpt": WORDS}


@pytest.fixture
def hosts(agent: Agent, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    kind, mesh = request.param
    plan = Plan(mesh=mesh, device="cpu")
    made = Hosts(agent, tmp_path / "run", recipe(kind, steps=STEPS, report=REPORT), DATA[kind], plan)
    yield made
    made.close()


RUNS: list[Any] = [
    pytest.param(("gpt", {"pipe": 3}), marks=pytest.mark.slow),  # a tensor that two stages use, dropout
    pytest.param(("resnet", {"data": 2, "pipe": 3}), marks=pytest.mark.soak),  # buffers
]


@pytest.mark.parametrize("hosts", RUNS, indirect=True, ids=["gpt", "resnet"])
def test_stages_of_a_host_and_then_of_the_leaders_are_made_again_from_copies(hosts, undisturbed):
    weights, steps = lose_one_and_then_the_leader(hosts, follower)
    kind = hosts.recipe.model.kind
    assert weights == undisturbed(recipe(kind, steps=steps, report=REPORT), data=DATA[kind])


@pytest.mark.soak
def test_of_two_hosts_the_leader_goes_on_alone_and_the_other_one_waits_and_says_so(agent, tmp_path, undisturbed):
    made, plan = recipe("gpt", steps=STEPS, report=REPORT), Plan(mesh={"pipe": 2}, device="cpu")
    with closing(Hosts(agent, tmp_path / "run", made, WORDS, plan, hosts=2)) as hosts:
        for number in range(2):
            hosts.start(number)
        hosts.trains_on({0, 1}, "the beginning")
        leader = hosts.leader()

        hosts.kill(1 - leader)
        hosts.trains_on({leader}, "the death of the agent that does not lead")
        hosts.restart(1 - leader)
        hosts.trains_on({0, 1}, "its return")
        hosts.kill(leader)
        until(lambda: hosts.of("paused"), "a line that says what is waited for")
        (paused,) = hosts.of("paused")
        assert "hears of no leader" in paused["why"]
        hosts.restart(leader)
        until(lambda: len(hosts.of("recovered")) == 2, "the return of the leader")
        hosts.trains_on({0, 1}, "its return, with new workers")
        weights, steps = hosts.ended_with_nothing_lost()
        assert weights == undisturbed(recipe("gpt", steps=steps, report=REPORT), data=WORDS)
