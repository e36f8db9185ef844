"""Folders of commands that were killed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shoal.run.scratch import scratch_folder

LEFT = """
import time
from shoal.run.scratch import scratch_folder
with scratch_folder("shoal-kind-") as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_command_left_goes_with_the_next_one_of_its_kind_and_one_at_work_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = subprocess.Popen(
        [sys.executable, "-c", LEFT], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    left = Path(killed.stdout.readline().decode().strip())
    with scratch_folder("shoal-kind-") as first:
        assert left.exists(), "its process lives"
        killed.kill()
        killed.wait()
        killed.stdout.close()
        with scratch_folder("shoal-other-"):
            assert left.exists(), "of another kind"
        with scratch_folder("shoal-kind-") as second:
            assert {*tmp_path.iterdir()} == {first, second}
    assert not list(tmp_path.iterdir())
