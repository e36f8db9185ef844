"""One agent for all tests of a session: a group of workers then costs a fork."""

from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest

from shoal.comm.launch import Agent


@pytest.fixture(scope="session")
def agent() -> Iterator[Agent]:
    with Agent() as agent:
        yield agent


@pytest.fixture
def on_workers(agent: Agent, request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Run a function of the test's own module in a group of workers; their results, by rank."""
    cloudpickle.register_pickle_by_value(request.module)

    def run(workers: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        return agent.run(function, arguments, workers=workers, **options)

    return run
