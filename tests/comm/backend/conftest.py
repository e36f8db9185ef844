"""Process groups in forked workers: the agent has everything imported, so that a group costs milliseconds."""

import os
import sys
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


@pytest.fixture(params=[True, False], ids=["compiled", "in python"])
def is_compiled(request: pytest.FixtureRequest) -> bool:
    """For tests that hold with and without the compiled library: pass it on to `in_group`."""
    return bool(request.param)


@pytest.fixture(scope="session")
def backend_agent(compiled: None) -> Iterator[Agent]:
    with Agent(PRELOAD) as agent:
        yield agent


def _inside(
    group: Any,
    kind: str,
    file: str,
    timeout_s: float,
    hosts: list[int] | None,
    is_compiled: bool,
    function: Any,
    *rest: Any,
) -> Any:
    """Join a process group, run ``function(rank, world, *rest)``, and leave it if nothing has gone wrong."""
    import warnings

    import torch.distributed as dist

    from shoal.comm.backend import meeting, registration

    warnings.simplefilter("ignore", FutureWarning)  # collectives that torch 2.13 gave new names keep their old ones

    if not is_compiled:
        os.environ["SHOAL_NATIVE"] = "0"
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
        is_compiled: bool = True,
        **options: Any,
    ) -> list[Any]:
        file = str(tmp_path / f"store{next(count)}-{os.getpid()}")
        arguments = (kind, file, timeout_s, hosts, is_compiled, function, *arguments)
        return backend_agent.run(_inside, arguments, workers=workers, **options)

    return run


def _parent_of(
    group: Any, workers: int, kind: str, file: str, timeout_s: float, is_compiled: bool, function: Any, *rest: Any
) -> list[Any]:
    """Fork the ranks: an agent ends them all when one of them is killed. Results, or how a rank ended."""
    import signal
    import types

    readers, pids = [], []
    for rank in range(workers):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            from shoal.comm.agent import die_with_parent

            die_with_parent(os.getppid())
            try:
                place = types.SimpleNamespace(rank=rank, world=workers)
                result: Any = _inside(place, kind, file, timeout_s, None, is_compiled, function, *rest)
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(cloudpickle.dumps(result))
            os._exit(0)
        os.close(writer)
        readers.append(reader)
        pids.append(pid)
    results = []
    for reader, pid in zip(readers, pids, strict=True):
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        results.append(cloudpickle.loads(data) if data else signal.Signals(-code).name)
    return results


@pytest.fixture
def in_mortal_group(backend_agent: Agent, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., list[Any]]:
    """As `in_group`, for ranks that die: a rank's entry is then the name of the signal."""
    cloudpickle.register_pickle_by_value(request.module)
    count = iter(range(10**6))

    def run(
        workers: int,
        function: Callable[..., Any],
        *arguments: Any,
        kind: str = "shm",
        timeout_s: float = 60.0,
        is_compiled: bool = True,
    ) -> Any:
        file = str(tmp_path / f"mortal{next(count)}-{os.getpid()}")
        return backend_agent.run(
            _parent_of, (workers, kind, file, timeout_s, is_compiled, function, *arguments), workers=1
        )[0]

    return run


cloudpickle.register_pickle_by_value(sys.modules[__name__])
