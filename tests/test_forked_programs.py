"""A program in a fork sees what it would see in an interpreter of its own, and ends as it would."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forked_programs import Program, Source, with_forks

from shoal.serve import replicas

SEES = """
import os, sys
handed = int(sys.argv[1])
os.write(handed, os.environ["GIVEN"].encode())
seen = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
print(sys.argv, os.getcwd(), os.getsid(0) == os.getpid(), "HOME" in os.environ, seen, sys.stdin.read(), sys.path[0])
print("beside", file=sys.stderr)
sys.exit(7)
"""
Start = Callable[..., Any]


@pytest.fixture(params=["its own interpreter", "a fork"])
def start(request: pytest.FixtureRequest) -> Start:
    forks = request.param == "a fork"
    return partial(Program, source=request.getfixturevalue("warm")) if forks else subprocess.Popen


def test_arguments_environment_folder_streams_and_descriptors_are_those_that_were_given(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reads, writes = os.pipe()
    process = start(
        [sys.executable, "-c", SEES, str(writes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[writes],
        start_new_session=True,
        text=True,
        env={"GIVEN": "handed on"},
    )
    os.close(writes)
    process.stdin.write("asked")
    process.stdin.close()
    process.stdin = None  # or communicate() would write to it
    assert process.wait(60) == 7
    assert process.communicate() == (
        f"{['-c', str(writes)]} {tmp_path} True False {sorted({0, 1, 2, writes})} asked \n",
        "beside\n",
    )
    assert os.read(reads, 100) == b"handed on"
    os.close(reads)


@pytest.mark.parametrize(
    ("program", "code"),
    [("pass", 0), ("raise SystemExit('why')", 1), ("1 / 0", 1), ("import os; os.kill(os.getpid(), 9)", -9)],
)
def test_it_ends_as_it_would(start: Start, program: str, code: int) -> None:
    process = start([sys.executable, "-c", program], stderr=subprocess.PIPE)
    assert process.wait(60) == process.poll() == process.returncode == code
    said = process.communicate()[1].decode()
    assert said.endswith({"raise SystemExit('why')": "why\n", "1 / 0": "division by zero\n"}.get(program, ""))
    assert bool(said) == (code == 1)


def test_it_can_be_waited_for_and_killed(start: Start) -> None:
    process = start([sys.executable, "-c", "import signal; signal.pause()"])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    assert process.poll() is None
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_what_a_fork_of_a_starter_starts_is_a_fork_of_it(warm: Source) -> None:
    """So that a tree of processes is the tree that interpreters would be."""
    program = """
import os, sys
from shoal.serve import replicas
child = replicas.subprocess.Popen([sys.executable, "-c", f"import os; assert os.getppid() == {os.getpid()}"])
print("torch" in sys.modules, child.wait(60))
"""
    popen = with_forks(replicas, warm).Popen
    process = popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.wait(60) == 0
    assert process.communicate()[0] == "True 0\n"


def test_a_program_that_writes_more_than_its_pipes_hold_is_read_while_it_runs(start: Start) -> None:
    writes = "import sys; sys.stderr.write('e' * 300_000); sys.stdout.write('o' * 200_000)"
    process = start([sys.executable, "-c", writes], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.communicate(timeout=120) == ("o" * 200_000, "e" * 300_000)
    assert process.returncode == 0
