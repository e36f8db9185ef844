"""Measure collectives: in processes of our own, or in those that torchrun started."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from shoal.cluster.cluster import gibibytes
from shoal.cluster.detect import launched_workers, memory_bytes, usable_cores
from shoal.comm.measuring import figures
from shoal.comm.measuring.cases import Settings, cells, memory_needed
from shoal.comm.measuring.figures import Measured
from shoal.errors import UserError

Progress = Callable[[Mapping[str, Any]], None]
PRELOAD = ("shoal.comm.measuring.rank",)
HANG_AFTER_S = 300.0


def sweep(settings: Settings, progress: Progress = lambda event: None) -> dict[str, Any]:
    """{"rows": [Row as a mapping], "wrong": [a line each], "machine": {...}, "settings": {...}}.

    Under torchrun every process calls it and gets the result; else ``settings.workers`` processes are started here.
    Raises UserError when a transport is not to be had or the sizes do not fit into memory, RunFailed when a rank
    failed."""
    every = cells(settings)
    needed, there = memory_needed(every, settings.workers), memory_bytes()
    if needed > 0.8 * there:
        raise UserError(
            f"bench collectives: {settings.workers} ranks need {gibibytes(needed)} for the largest size, and there are "
            f"{gibibytes(there)}: take smaller --sizes or fewer --workers."
        )
    ranks = _joined(settings, progress) if launched_workers() else _started(settings, progress)
    return {
        "machine": machine(),
        "settings": asdict(settings),
        "rows": [asdict(row) for row in figures.rows(every, ranks)],
        "wrong": figures.wrong(ranks),
    }


def _started(settings: Settings, progress: Progress) -> Sequence[Sequence[Measured]]:
    from shoal.comm.launch import Agent
    from shoal.comm.measuring.rank import measure

    with Agent(PRELOAD) as agent:
        return agent.run(
            measure,
            (settings,),
            workers=settings.workers,
            hang_after_s=HANG_AFTER_S,
            listen=lambda rank, event: progress(event),
        )


def _joined(settings: Settings, progress: Progress) -> Sequence[Sequence[Measured]]:
    import cloudpickle

    from shoal.comm.distributed import DistributedGroup
    from shoal.comm.measuring.rank import measure

    group = DistributedGroup(HANG_AFTER_S, accelerator="nccl" in settings.transports)
    try:
        group.listen(progress)
        own = measure(group, settings)
        return [cloudpickle.loads(row) for row in group.gather(cloudpickle.dumps(own))]
    finally:
        group.close()


def machine() -> dict[str, Any]:
    import torch

    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "system": platform.system(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
