"""A step, done again where that helps; else what has been saved of wrong weights is put out of the way."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shoal.train import checkpoint
from shoal.train.at_rest import Corrupt
from shoal.train.checksum import Diverged
from shoal.train.not_finite import NotFinite
from shoal.train.step import Step
from shoal.train.worker import Worker

DOUBTFUL = "doubtful-"  # before the name of a checkpoint's folder: no such name is ever loaded


def carried_out(step: Step, once: Callable[[], None], worker: Worker, saved: Path) -> tuple[str, float]:
    """Do a step by ``once``. What was wrong with the first try, "" mostly, and the seconds that a second one took.

    A fault of the moment does not come twice. Raises NotFinite when it does, and Diverged: all workers do."""
    try:
        once()
    except Diverged as found:
        _doubt(found, worker, saved)
        raise
    except Corrupt:  # nobody else knows: what this worker has saved since its last update may hold it
        if worker.rank == 0:
            worker.close()
            set_aside(saved, worker.step)
        raise
    except NotFinite as first:
        if not step.redoes:
            raise
        begun = time.perf_counter()
        step.again()
        try:
            once()
        except NotFinite as second:
            raise second.again() from first
        return str(first), time.perf_counter() - begun
    return "", 0.0


def _doubt(found: Diverged, worker: Worker, saved: Path) -> None:
    """Rank 0 saves: when it is the one that is wrong, so may be what it has saved since all agreed last."""
    if worker.rank == 0 and 0 in found.ranks:
        worker.close()
        set_aside(saved, worker.step)
    worker.group.gather(b"")  # nobody ends the run before that is done


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints of a step so that nobody goes on from them."""
    for listed in checkpoint.listing(folder):
        if listed.step == step:
            with suppress(OSError):
                os.rename(listed.path, listed.path.with_name(f"{DOUBTFUL}{listed.path.name}"))
