"""Elastic runs in the agent of the session, and runs that can be compared with an undisturbed one."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from train import tiny_runs

from shoal.comm.launch import Agent
from shoal.elastic.api import train_elastic
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run
from shoal.train.api import train

cloudpickle.register_pickle_by_value(tiny_runs)


@pytest.fixture(autouse=True)
def sent_whole(request: pytest.FixtureRequest) -> None:
    """Models of a test's own go to workers, who cannot import the test's module."""
    cloudpickle.register_pickle_by_value(request.module)


@pytest.fixture(scope="session")
def undisturbed(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """weights_sha256 of a recipe, trained by one worker that nothing happens to."""
    known: dict[str, str] = {}

    def weights(recipe: Recipe, **options: Any) -> str:
        key = recipe.to_toml()
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            plan = Plan(device="cpu")
            known[key] = train(recipe, plan, agent=agent, run_dir=folder, **options)["weights_sha256"]
        return known[key]

    return weights


class Disturbed:
    """A run of workers that things happen to, and what its log says of them."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.run = Run(Path(result["run_dir"]))
        self.events = self.run.events()

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    @property
    def steps(self) -> list[int]:
        return [e["step"] for e in self.of("committed")]


@pytest.fixture
def disturb(agent: Agent, tmp_path: Path) -> Iterator[Callable[..., Disturbed]]:
    """Train elastically; afterwards nothing of the run may be left in its agent: no process, no open file."""
    pid = agent._process.pid

    def opened() -> list[str]:
        links = (os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd"))
        return sorted(re.sub(r"\d+", "n", link) for link in links)

    before = opened()

    def train_it(
        recipe: Recipe, workers: int = 3, *, how: Mapping[str, Any] | None = None, **options: Any
    ) -> Disturbed:
        plan = Plan(**{"mesh": {"data": workers}, "device": "cpu", **(how or {})})
        return Disturbed(train_elastic(recipe, plan, agent=agent, run_dir=tmp_path / "run", **options))

    yield train_it
    assert not Path(f"/proc/{pid}/task/{pid}/children").read_text().split(), "workers are left"
    assert opened() == before
