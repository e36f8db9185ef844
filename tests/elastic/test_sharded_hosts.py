"""Slices that one worker alone holds are in the memory of another host: a host is lost whole, and not a bit of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic.agents_here import REPORT, STEPS, Hosts, follower, lose_one_and_then_the_leader
from train.tiny_runs import recipe, splits

from shoal.comm.launch import Agent
from shoal.recipe.plan import Plan

IMAGES, WORDS = splits("cnn", 101), splits("gpt", 101)
DATA: dict[str, Any] = {"resnet": IMAGES, "gpt": WORDS}


@pytest.fixture
def hosts(agent: Agent, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    states, kind, workers = request.param
    plan = Plan(mesh={"data": workers}, device="cpu", states=states)
    made = Hosts(agent, tmp_path / "run", recipe(kind, steps=STEPS, report=REPORT), DATA[kind], plan)
    yield made
    made.close()


RUNS: list[Any] = [
    pytest.param(("zero1", "resnet", 3), marks=pytest.mark.soak),
    pytest.param(("zero2", "gpt", 6), marks=pytest.mark.soak),
    pytest.param(("zero3", "gpt", 3), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("hosts", RUNS, indirect=True, ids=["zero1", "zero2", "zero3"])
def test_a_host_and_then_the_leaders_are_lost_with_all_their_memory(hosts, undisturbed):
    weights, steps = lose_one_and_then_the_leader(hosts, follower)
    kind = hosts.recipe.model.kind
    assert weights == undisturbed(recipe(kind, steps=steps, report=REPORT), data=DATA[kind])
