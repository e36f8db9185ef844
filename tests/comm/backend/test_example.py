"""The program on the page about communication, as torchrun starts it."""

import os
import socket
import sys
from pathlib import Path
from subprocess import PIPE

from forked_programs import Program

EXAMPLE = Path(__file__).parents[3] / "examples" / "ddp_over_shm.py"


def test_the_example_learns_the_same_on_any_number_of_ranks_and_says_nothing_else(warm):
    code = f"import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    losses = set()
    for ranks, total in ((1, 0), (2, 1)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        pipes = {"stdout": PIPE, "stderr": PIPE, "text": True}
        programs = [
            Program([sys.executable, "-c", code], source=warm, env={**os.environ, **job, "RANK": str(rank)}, **pipes)
            for rank in range(ranks)
        ]
        (first, *others), complaints = zip(*(program.communicate(100) for program in programs), strict=True)
        assert [program.returncode for program in programs] == [0] * ranks, complaints
        assert [*others, *complaints] == [""] * (2 * ranks - 1)
        loss, _, said = first.strip().partition(", ")
        assert said == f"sum of ranks {total}"
        losses.add(loss)
    assert len(losses) == 1
