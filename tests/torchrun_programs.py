"""Programs in forks of one process, in the environment that torchrun gives its ranks."""

import os
import socket
import sys
from subprocess import PIPE

from forked_programs import Program, Source


def outputs(code: str, ranks: int, source: Source) -> tuple[list[str], list[str]]:
    """What each rank prints, and what it says on standard error. AssertionError where one does not end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    programs = [
        Program(
            [sys.executable, "-c", code], source=source, stdout=PIPE, stderr=PIPE, text=True,
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    printed, complaints = zip(*(program.communicate(100) for program in programs), strict=True)
    assert [program.returncode for program in programs] == [0] * ranks, complaints
    return [*printed], [*complaints]
