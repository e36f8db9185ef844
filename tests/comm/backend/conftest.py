"""Process groups in forked workers: the agent has everything imported, so that a group costs milliseconds."""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from shoal.comm.launch import Agent
from shoal.comm.native import build

PRELOAD = (
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.optim",
    "torch.distributed.checkpoint",
    "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook",
    "torch.nn.parallel",
    "shoal.comm.backend.reform",
)


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    assert build.backend() is not None, build.why_not(("backend",))


@pytest.fixture(scope="session")
def backend_agent(compiled: None) -> Iterator[Agent]:
    with Agent(PRELOAD) as agent:
        yield agent


def _inside(
    group: Any, kind: str, file: str, timeout_s: float, hosts: list[int] | None, function: Any, *rest: Any
) -> Any:
    """Join a process group, run ``function(rank, world, *rest)``, and leave it if nothing has gone wrong."""
    import warnings

    import torch.distributed as dist

    from shoal.comm.backend import meeting, registration

    warnings.simplefilter("ignore", FutureWarning)  # collectives that torch 2.13 gave new names keep their old ones

    if hosts is not None:  # ranks of different numbers say that they run on different machines
        meeting.boot_id = lambda: f"machine {hosts[group.rank]}"
    registration.install()
    dist.init_process_group(
        kind,
        init_method=f"file://{file}",
        rank=group.rank,
        world_size=group.world,
        timeout=timedelta(seconds=timeout_s),
    )
    result = function(group.rank, group.world, *rest)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


@pytest.fixture
def in_group(backend_agent: Agent, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a function of the test's own module in the ranks of a process group; their results, by rank."""
    cloudpickle.register_pickle_by_value(request.module)
    count = iter(range(10**6))

    def run(
        workers: int,
        function: Callable[..., Any],
        *arguments: Any,
        kind: str = "shm",
        timeout_s: float = 60.0,
        hosts: list[int] | None = None,
        **options: Any,
    ) -> list[Any]:
        file = str(tmp_path / f"store{next(count)}-{os.getpid()}")
        arguments = (kind, file, timeout_s, hosts, function, *arguments)
        return backend_agent.run(_inside, arguments, workers=workers, **options)

    return run


cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_inside"]))
