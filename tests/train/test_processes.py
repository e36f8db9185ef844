"""Real processes: the command under Ctrl-C, SIGTERM and kill -9, and the same recipe under torchrun."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from forked_programs import Program, Source
from train.tiny_runs import Images, recipe

from shoal.recipe.recipe import DataSpec, ModelSpec, Reporting
from shoal.run.run import Run

DEADLINE_S = 240.0  # on a busy host; nobody waits for it
Process = subprocess.Popen[str] | Program


@dataclass(frozen=True)
class Mark:
    """What every process of a test has: the test's own folder to work in. ``warm`` is what programs are forked from."""

    folder: Path
    warm: Source


@pytest.fixture
def mark(warm: Source, tmp_path: Path) -> Iterator[Mark]:
    """No process of the test may be left at the end."""
    value = Mark(tmp_path, warm)
    yield value
    for pid in marked(value):
        os.kill(pid, signal.SIGKILL)


def marked(mark: Mark) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if (entry / "cwd").readlink() == mark.folder:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def until(true: Callable[[], object], what: str) -> None:
    """Other processes are watched, with a deadline; nothing is timed."""
    end = time.monotonic() + DEADLINE_S
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    batch = Images(101).fetch(np.arange(101), 0)
    np.savez(tmp_path / "data.npz", input=batch["input"].numpy(), target=batch["target"].numpy())
    return tmp_path


def write_recipe(folder: Path, **changes: object) -> Path:
    wanted = recipe(
        "mlp",
        model=ModelSpec(kind="mlp", options={"hidden": [700, 300]}),  # several blocks, so several buckets
        data=DataSpec(source="arrays", path=str(folder / "data.npz"), validation=0.1),
        clip=0.05,
        **changes,
    )
    (folder / "recipe.toml").write_text(wanted.to_toml())
    return folder / "recipe.toml"


def start(mark: Mark, folder: Path, *command: str) -> Program:
    """``python -m MODULE ...``, or ``-c CODE``, in a fork of a process that has imported what they use."""
    return Program(
        [sys.executable, *command],
        source=mark.warm,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_afresh(folder: Path, *command: str) -> subprocess.Popen[str]:
    """In an interpreter of its own, which imports what it needs."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def shoal(mark: Mark, folder: Path, *arguments: str) -> Program:
    return start(mark, folder, "-m", "shoal", *arguments)


def steps_done(run: Path) -> int:
    return sum(event["event"] == "committed" for event in Run(run).events())


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


LONG = {"steps": 100_000}


LONG_RUN = ("-m", "shoal", "train", "recipe.toml", "--workers", "3", "--run-dir", "run")


def long_run(mark: Mark, folder: Path) -> Program:
    write_recipe(folder, **LONG)
    return begun(start(mark, folder, *LONG_RUN), folder)


def begun(process: Process, folder: Path) -> Process:
    until(lambda: process.poll() is not None or steps_done(folder / "run") >= 3, "the first steps")
    assert process.poll() is None, process.communicate()
    return process


def test_ctrl_c_saves_and_exits_130_and_the_resumed_run_has_the_bits_of_an_uninterrupted_one(mark, folder):
    write_recipe(folder, **LONG)
    process = begun(start_afresh(folder, *LONG_RUN), folder)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err
    assert "stopping after this step" in err
    assert not marked(mark)
    done = steps_done(folder / "run")
    log = Run(folder / "run").events()
    assert [event["event"] for event in log][-2:] == ["interrupted", "ended"]
    assert log[-1]["result"]["checkpoint"].endswith(f"step-{done:08d}")
    total = str(done + 5)
    rest = shoal(mark, folder, "train", "--resume", "run", "--workers", "2", "--steps", total, "--json")
    whole = shoal(mark, folder, "train", "recipe.toml", "--workers", "1", "--steps", total, "--json")
    said = [json.loads(process.communicate(timeout=DEADLINE_S)[0]) for process in (rest, whole)]
    assert said[0]["weights_sha256"] == said[1]["weights_sha256"]


def test_sigterm_saves_too(mark, folder):
    process = long_run(mark, folder)
    process.terminate()
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err
    assert Run(folder / "run").result["interrupted"]
    assert not marked(mark)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(mark, folder, number):
    """The worker is stopped, so that the step in flight can never end."""
    process = long_run(mark, folder)
    workers = [pid for pid in marked(mark) if pid != process.pid]
    for pid in workers:
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] in map(str, workers):
            os.kill(pid, signal.SIGSTOP)
    process.send_signal(number)
    assert process.stderr is not None
    seen = ""
    while "once more to stop at once" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(number)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    until(lambda: not marked(mark), "all processes to be gone")


def test_kill_9_of_the_launcher_leaves_no_process_and_no_shared_memory(mark, folder):
    before = shared_memory()
    process = long_run(mark, folder)
    assert len(marked(mark)) == 5  # the launcher, its agent, three workers
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    until(lambda: not marked(mark), "all processes to be gone")
    assert shared_memory() <= before


def test_kill_9_of_the_agent_is_told_and_leaves_no_worker(mark, folder):
    process = long_run(mark, folder)
    pids = marked(mark)
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) for pid in pids}
    agent = next(pid for pid, parent in parents.items() if parent == process.pid)
    os.kill(agent, signal.SIGKILL)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert re.search(r"^shoal: the agent of \S+ \(pid \d+\) ended with -9$", err, re.MULTILINE)
    until(lambda: not marked(mark), "all processes to be gone")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workers", "9"], "9 workers for 8 shards"),
        (["--batch", "17"], "batch 17 is not divisible by 8 shards"),
        (["--set", "data.path=nowhere.npz"], "nowhere.npz"),
        (["--set", "model.hiden=3"], "hidden"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_is_created(mark, folder, arguments, text):
    write_recipe(folder)
    before = sorted(folder.rglob("*"))
    process = shoal(mark, folder, "train", "recipe.toml", "--run-dir", "run", *arguments)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("shoal: ")
    assert text in err
    assert out == ""
    assert sorted(folder.rglob("*")) == before


# --- torchrun -----------------------------------------------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# torchrun whose workers are forks of it: it starts PYTHON -u -m MODULE, once for each of them
FORKING = """
import sys
from forked_programs import Program
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.run import main
subprocess_handler.Popen = lambda args, **how: Program([args[0], *args[2:]], **how)
main(sys.argv[1:])
"""


def torchrun(mark: Mark, folder: Path, workers: int, *module: str) -> Program:
    """``python -m MODULE ...`` on so many workers."""
    return start(mark, folder, "-c", FORKING, *torchruns(folder, workers), *module)


def torchrun_afresh(folder: Path, workers: int, *module: str) -> subprocess.Popen[str]:
    """Its workers are interpreters of their own."""
    return start_afresh(folder, "-m", "torch.distributed.run", *torchruns(folder, workers), *module)


def torchruns(folder: Path, workers: int) -> list[str]:
    logs = str(folder / "torchrun")  # else among the temporary files, where they stay
    return ["--nproc-per-node", str(workers), "--master-port", free_port(), "--log-dir", logs]


def trained(process: Process, folder: Path) -> dict:
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    assert "Warning" not in err
    return json.loads(out.splitlines()[-1])


def test_torchrun_gives_the_same_bits_as_the_local_launcher(mark, folder):
    write_recipe(folder, micro_batches=2, report=Reporting(evaluate_every=4, checkpoint_every=5))
    local = trained(shoal(mark, folder, "train", "recipe.toml", "--workers", "2", "--json"), folder)
    small = ("--set", "bucket_bytes=1", "--json")  # many collectives in flight at once
    joined = trained(
        torchrun_afresh(folder, 3, "-m", "shoal", "train", "recipe.toml", "--run-dir", "on3", *small), folder
    )
    assert joined["weights_sha256"] == local["weights_sha256"]
    assert joined["figures"] == local["figures"]
    fast = torchrun(mark, folder, 2, "-m", "shoal", "train", "recipe.toml", "--run-dir", "fast", "--fast", *small)
    assert trained(fast, folder)["loss"] == pytest.approx(local["loss"], rel=1e-3, abs=1e-4)
    assert not marked(mark)


OWN_LOOP = """
import os, signal, sys
import torch
import torch.nn.functional as F
import shoal
from shoal.recipe.plan import Plan

def main(worker, deed):
    model = worker.model(torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Dropout(0.1), torch.nn.Linear(9, 2)))
    worker.optimizer(torch.optim.AdamW(model.parameters(), lr=0.01))
    data = torch.utils.data.TensorDataset(torch.arange(400.0).sin().view(100, 4), torch.arange(100) % 2)
    for step in worker.steps(data, batch=16, epochs=3):
        for batch in step:
            x, y = batch.values()
            step.backward(F.cross_entropy(model(x), y, reduction="sum"), count=len(y))
        step.commit()
        if worker.step == 9 and worker.rank == 1:
            if deed == "raise":
                raise ValueError("planted")
            if deed:
                os.kill(os.getpid(), getattr(signal, deed))
    return worker.weights_sha256

if __name__ == "__main__":
    workers = int(os.environ.get("WORLD_SIZE", "2"))
    print(shoal.launch(main, sys.argv[1], plan=Plan(mesh={"data": workers}, device="cpu", hang_after_s=2.0)))
"""


@pytest.fixture
def own_loop(folder: Path) -> Path:
    (folder / "own.py").write_text(OWN_LOOP)
    return folder


def test_a_loop_of_ones_own_gives_the_same_bits_as_a_script_and_under_torchrun(mark, own_loop):
    processes = [start(mark, own_loop, "-m", "own", ""), torchrun(mark, own_loop, 3, "-m", "own", "")]
    outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
    said = [re.findall(r"[0-9a-f]{64}", output) for output in outputs]  # ranks share a pipe, and lines mix
    assert len(said[0]) == 1
    assert said == [said[0], said[0] * 3]


@pytest.mark.parametrize("deed", ["SIGKILL", "SIGSTOP"])
def test_under_torchrun_a_lost_worker_ends_the_others_with_a_line_that_names_it(mark, own_loop, deed):
    process = torchrun(mark, own_loop, 3, "-m", "own", deed)
    said = ""
    pattern = r"rank [02] on \S+ lost its peers at step 10 in [^:]*: rank 1 on \S+ \(pid (\d+)\) is silent, last at"
    assert process.stderr is not None
    for line in process.stderr:
        said += line
        found = re.search(pattern, line)
        if found and deed == "SIGSTOP":
            os.kill(int(found[1]), signal.SIGKILL)  # torchrun itself would give it half a minute
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert re.search(pattern, said), said
    until(lambda: not marked(mark), "all processes to be gone")
