"""The program on the page about communication, as a user starts it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_example_learns_the_same_on_any_number_of_ranks_and_says_nothing_else():
    losses = set()
    for ranks, total in ((1, 0), (2, 1)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*command, str(ROOT / "examples" / "ddp_over_shm.py")],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if "OMP_NUM_THREADS" not in line and line.strip("*")]
        loss, _, said = done.stdout.strip().partition(", ")
        assert said == f"sum of ranks {total}"
        losses.add(loss)
    assert len(losses) == 1
