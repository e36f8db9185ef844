"""Runs in the agent of the session: a group of workers then costs a fork."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from forked_programs import Source, with_forks
from train import tiny_runs
from worker_fixtures import on_workers

from shoal.comm import launch
from shoal.comm.launch import Agent
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.train.api import train

__all__ = ["on_workers"]

cloudpickle.register_pickle_by_value(tiny_runs)


@pytest.fixture
def run(agent: Agent, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """Train a recipe on a number of workers in a run directory of its own; the result."""
    cloudpickle.register_pickle_by_value(request.module)
    count = 0

    def train_it(recipe: Recipe, workers: int = 1, *, plan: Plan | None = None, **options: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        plan = plan or Plan(mesh={"data": workers}, device="cpu")
        if "resume" not in options:
            options.setdefault("run_dir", tmp_path / f"run{count}")
        return train(recipe, plan, agent=agent, **options)

    return train_it


@pytest.fixture
def agents_here(warm: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that a test starts are its own, with its stderr, and forks of a process that has imported everything."""
    monkeypatch.setattr(launch, "subprocess", with_forks(launch, warm))
