"""Groups of workers in the agent of the session."""

from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import resident
import torchrun_workers

from shoal.comm.launch import Agent


@pytest.fixture
def on_workers(agent: Agent, request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Run a function of the test's own module in a group of workers; their results, by rank."""
    for module in (request.module, resident):
        cloudpickle.register_pickle_by_value(module)

    def run(workers: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        return agent.run(function, arguments, workers=workers, **options)

    return run


@pytest.fixture
def under_torchrun(on_workers: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """As `on_workers`, with workers that have joined as torchrun would have started them."""
    cloudpickle.register_pickle_by_value(torchrun_workers)

    def run(workers: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return on_workers(workers, torchrun_workers.as_torchrun, function, *arguments)

    return run


@pytest.fixture(params=["host", "torch.distributed"])
def on_group(request: pytest.FixtureRequest) -> Any:
    """Run a test on workers of one host, and on such that have joined as torchrun would have started them."""
    return request.getfixturevalue("on_workers" if request.param == "host" else "under_torchrun")
