"""Arms of bench/elastic.py beside Shoal's: what others need from SIGKILL of a worker to the next step of the same job.

All train the model, batch and optimiser of the bench in four processes, one thread each, over gloo. `torchrun` and
`ray` (Ray Train) start all workers anew from a checkpoint that is written after each step; with `torchft` the others go
on without the lost one, each after its own forward pass, as its documentation shows: every worker is a replica group,
which the bench starts anew, as a scheduler would. Ray and torchft are run by `--peers-python`, of an environment that
has them, and torch. A peer that is not installed there is named in one line.
"""

import os
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE_S = 300.0
STEPS_BETWEEN = 20  # that are done before the next worker is killed

HEAD = """
import os, sys, time, torch, torch.distributed as dist
from pathlib import Path
from shoal.models.registry import build, task_for
from shoal.recipe.recipe import ModelSpec
folder = Path(sys.argv[1])
torch.set_num_threads(1)
spec, facts = ModelSpec(kind="cnn"), {"shape": (1, 28, 28), "classes": 10}
task = task_for(spec, facts)
torch.manual_seed(0)
batch = {"input": torch.randn(64, 1, 28, 28), "target": torch.randint(10, (64,))}

def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

def backward(model):
    total, count = task.loss(model, batch)
    (total / count).backward()

def log(folder, *words):
    with open(folder / "steps", "a") as steps:
        steps.write(" ".join(map(str, (time.time(), *words))) + "\\n")

def here(folder, rank):
    (folder / f"pid{rank}.new").write_text(str(os.getpid()))
    os.replace(folder / f"pid{rank}.new", folder / f"pid{rank}")

def save(path, **state):
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)
"""

TORCHRUN = """
rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
store = f"file://{folder}/store{attempt}"  # its own store for each attempt: nobody looks for those of the last one
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
here(folder, rank)
model = torch.nn.parallel.DistributedDataParallel(build(spec, facts))
optimizer = adamw(model)
step, saved = 0, folder / "saved.pt"
if saved.exists():
    state = torch.load(saved)
    step = state["step"]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
while True:
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if rank == 0:
        save(saved, step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
        log(folder, attempt)
"""

TORCHFT = """
from datetime import timedelta
from torchft import Manager, Optimizer, ProcessGroupGloo
from torchft.ddp import PureDistributedDataParallel
group, lighthouse = int(sys.argv[2]), sys.argv[3]
here(folder, group)
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
model = build(spec, facts)
inner = adamw(model)

def load(state):
    model.load_state_dict(state["model"])
    inner.load_state_dict(state["optimizer"])

manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=30)), min_replica_size=2, load_state_dict=load,
    state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
    lighthouse_addr=lighthouse, replica_id=f"group{group}", store_addr="127.0.0.1", store_port=store.port,
    rank=0, world_size=1, hostname="127.0.0.1", timeout=timedelta(seconds=30),
)
# its other wrapper, 0.2.0 beside torch 2.13, ends the survivors with an AssertionError when a peer is lost
wrapped, optimizer = PureDistributedDataParallel(manager, model), Optimizer(manager, inner)
while True:
    optimizer.zero_grad()
    backward(wrapped)
    before = manager.current_step()
    optimizer.step()
    if manager.current_step() > before:
        log(folder, manager.num_participants())
"""

LIGHTHOUSE = """
import time
from torchft.coordination import LighthouseServer
server = LighthouseServer(bind="127.0.0.1:PORT", min_replicas=2, join_timeout_ms=10000, quorum_tick_ms=100)
print("ready", flush=True)
while True:
    time.sleep(60)
"""  # the times are those of torchft's own introduction

RAY = """
import ray, tempfile
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

def loop(config):
    torch.set_num_threads(1)
    folder, rank = Path(config["folder"]), train.get_context().get_world_rank()
    here(folder, rank)
    model = prepare_model(build(spec, facts))
    optimizer, step = adamw(model), 0
    if found := train.get_checkpoint():
        with found.as_directory() as saved:
            state = torch.load(Path(saved) / "saved.pt")
        step = state["step"]
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    attempt = os.getpid()
    while True:
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        with tempfile.TemporaryDirectory() as made:
            mine = None
            if rank == 0:
                save(Path(made) / "saved.pt", step=step, model=model.module.state_dict(),
                     optimizer=optimizer.state_dict())
                mine = Checkpoint.from_directory(made)
            train.report({"step": step}, checkpoint=mine)
        if rank == 0:
            log(folder, attempt)

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
config = RunConfig(storage_path=str(folder / "ray"), name="job", failure_config=FailureConfig(max_failures=-1))
TorchTrainer(loop, train_loop_config={"folder": str(folder)}, scaling_config=ScalingConfig(num_workers=4),
             run_config=config).fit()
"""


class _Job:
    """Seen through the folder: who is there, and a line for each step, its time and a word."""

    def __init__(self, folder: Path, script: str) -> None:
        folder.mkdir()
        self.folder, self.script = folder, folder / "job.py"
        self.script.write_text(HEAD + script)
        self.processes: list[subprocess.Popen[Any]] = []

    def start(self, stack: ExitStack, *command: str, **options: Any) -> "subprocess.Popen[Any]":
        root = str(Path(__file__).parents[1])
        inner = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        for wait in ("RAY_raylet_start_wait_time_s", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"):
            inner[wait] = str(int(PATIENCE_S))  # a loaded machine takes longer than 30 s
        log = stack.enter_context((self.folder / "said").open("a"))
        given = {"stdout": log, "stderr": log, "env": inner, "start_new_session": True, **options}
        process = subprocess.Popen(command, **given)
        self.processes.append(process)
        stack.enter_context(_ended(process))
        return process

    def steps(self) -> list[list[str]]:
        file = self.folder / "steps"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def until(self, true: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + PATIENCE_S
        while not (found := true()):
            if time.monotonic() > end or all(each.poll() is not None for each in self.processes[-1:]):
                said = (self.folder / "said").read_text()[-2000:]
                raise RuntimeError(f"no {what}: {said}")
            time.sleep(0.02)
        return found

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid{rank}").read_text())

    def after(self, at: float, word: str) -> float | None:
        """Seconds from ``at`` to the first step after it whose word is another one."""
        later = (float(line[0]) for line in self.steps() if float(line[0]) > at and line[1] != word)
        found = next(later, None)
        return None if found is None else found - at


@contextmanager
def _ended(process: "subprocess.Popen[Any]") -> Any:
    """It and all that it has started have gone when the block is left."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def torchrun(folder: Path, python: str, kills: int, workers: int) -> dict[str, Any]:
    job = _Job(folder / "torchrun", TORCHRUN)
    command = [python, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(workers)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--max-restarts", "99"]
    with ExitStack() as stack:
        job.start(stack, *command, *rendezvous, str(job.script), str(job.folder))
        return _killed(job, "torchrun", kills, lambda number: 1 + number % (workers - 1))


def ray(folder: Path, python: str, kills: int, workers: int) -> dict[str, Any]:
    job = _Job(folder / "ray", RAY)
    with ExitStack() as stack:
        job.start(stack, python, str(job.script), str(job.folder))
        return _killed(job, "ray", kills, lambda number: 1 + number % (workers - 1))


def torchft(folder: Path, python: str, kills: int, workers: int) -> dict[str, Any]:
    job = _Job(folder / "torchft", TORCHFT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        house = job.start(
            stack, python, "-c", LIGHTHOUSE.replace("PORT", str(port)), stdout=subprocess.PIPE, stderr=None
        )
        assert house.stdout is not None
        house.stdout.readline()

        def group(number: int) -> None:
            job.start(stack, python, str(job.script), str(job.folder), str(number), f"http://127.0.0.1:{port}")

        for number in range(workers):
            group(number)
        return _killed(job, "torchft", kills, lambda number: 1 + number % (workers - 1), str(workers), group)


def _killed(
    job: _Job,
    name: str,
    kills: int,
    victim: Callable[[int], int],
    full: str = "",
    again: Callable[[int], None] = lambda rank: None,
) -> dict[str, Any]:
    """``full``: the word of steps in which all take part, where others go on without the lost one."""
    took = []
    for number in range(kills):
        enough = len(job.steps()) + STEPS_BETWEEN

        def trains(enough: int = enough) -> bool:
            steps = job.steps()
            return len(steps) > enough and (not full or steps[-1][1] == full)

        job.until(trains, "steps")
        rank, word = victim(number), job.steps()[-1][1]
        pid = job.pid(rank)
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        took.append(job.until(lambda at=at, word=word: job.after(at, word), "step after a kill"))
        print(f"  {name} {number + 1}: {took[-1]:.2f} s", flush=True)
        again(rank)
    return {"seconds": took, "p50": statistics.median(took)}


def installed(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


PEERS: dict[str, tuple[str, Callable[[Path, str, int, int], dict[str, Any]]]] = {  # the module that it needs
    "torchrun": ("torch", torchrun),
    "ray": ("ray.train", ray),
    "torchft": ("torchft", torchft),
}


def measure(name: str, folder: Path, python: str, kills: int, workers: int) -> dict[str, Any] | None:
    """None, told in one line, where the peer is not installed."""
    module, arm = PEERS[name]
    if not installed(python, module):
        print(f"  {name} is not installed for {python}: pip install {module.partition('.')[0]} there", flush=True)
        return None
    return arm(folder, python, kills, workers)
