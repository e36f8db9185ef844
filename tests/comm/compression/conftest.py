"""Groups of torch.distributed over gloo, in workers that cost a fork each."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest


def _joined(group: Any, kind: str, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    import shoal.comm

    if kind != "gloo":
        shoal.comm.install()
    dist.init_process_group(kind, store=dist.FileStore(store, group.world), rank=group.rank, world_size=group.world)
    try:
        return function(group.rank, group.world, *arguments)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def over_gloo(on_workers: Callable[..., list[Any]], tmp_path: Path) -> Callable[..., list[Any]]:
    """Run ``function(rank, world, *arguments)`` of the test's module in a gloo group, or one of another ``kind``; the
    results, by rank."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    calls = iter(range(1000))

    def run(workers: int, function: Callable[..., Any], *arguments: Any, kind: str = "gloo") -> list[Any]:
        return on_workers(workers, _joined, kind, str(tmp_path / f"store-{next(calls)}"), function, arguments)

    return run
