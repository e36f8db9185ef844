"""What faults cost: from SIGKILL to the next committed step, goodput under kills, and what elasticity costs when
nothing fails; torchrun's restart of the same job beside it.

    python bench/elastic.py [--faults 30] [--goodput-s 120] [--rounds 6] [--restarts 3] [--only crash,calm,...]
    python bench/elastic.py --only slices,stage,server [--quick]     # under 3 minutes on an idle machine
    python bench/elastic.py --only "calm slices,calm stage,calm server"
    python bench/elastic.py --only hosts           # about 8 minutes on an idle machine
    python bench/elastic.py --only "hosts stage,hosts server" --faults 10

`crash`: 4 workers, one after the other is killed by SIGKILL at a moment of the clock, every third time rank 0; from the
signal to the event `recovered`, which the agent writes when it hears that a survivor has committed a step. `goodput`:
a kill every 15 s, for `--goodput-s` (600 for ten minutes; 20 with --quick); committed steps a second over those of the
same run without kills, just before and after (120 s of each at most), not adjusted for the capacity that is missing;
and whether the weights are those of a fault-free run of as many steps, which follows. `calm`: seconds of a step with
and without --elastic, in turns, the median over the rounds of one round's ratio. `slices`, `stage`, `server` are
`crash` with sharded states, with a pipeline of 4 stages, and with 2 servers of 2 workers, of which only the servers
are killed; `calm slices` and so on: what these cost when nothing fails. `resize`: seconds between two steps when
workers are added and taken away. `hosts`: three agents on this machine, a worker each; in turns an agent is killed, the
leader is killed, and a host is cut off (both ways, by the relay); from the fault to the event `recovered`, `--faults`
of each kind, each once the host before trains again; `hosts stage` and `hosts server`: a pipeline of 3 stages, and 2
workers and a server, one on each host, where every other agent that is killed is the server's. `torchrun`, `ray` and
`torchft`: what these need for the same (bench/elastic_peers.py), the latter two where `--peers-python` has them.

    python bench/elastic.py --only crash,torchrun,ray,torchft --peers-python PYTHON

Results go into `bench/results/elastic.json`, each arm in the place of its last run; with --quick only to `--out`.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from elastic_peers import PEERS, measure
from turns import turns

from shoal.comm.launch import Agent
from shoal.comm.measuring.sweep import machine
from shoal.elastic import roster
from shoal.elastic.api import PRELOAD, train_elastic
from shoal.elastic.commands import resize
from shoal.elastic.emulated import EmulatedHosts
from shoal.elastic.hosts import jobs
from shoal.elastic.network import Relay, Trouble
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import DataSpec, ModelSpec, OptimizerSpec, Recipe, Reporting, ScheduleSpec
from shoal.run.tail import told_lately
from shoal.train.api import train

RESULTS = Path(__file__).parent / "results" / "elastic.json"
WORKERS, EVERY_S, PATIENCE_S, CALM_S = 4, 15.0, 300.0, 120.0
GOALS = {"crash p50": 1.5, "crash p99": 4.0, "calm": 1.03, "goodput": 0.9, "stage p99": 4.0, "server p99": 2.0}
KINDS = {  # whose processes hold what no other one does
    "slices": Plan(mesh={"data": WORKERS}, states="zero1"),
    "stage": Plan(mesh={"pipe": WORKERS}),
    "server": Plan(mesh={"data": 2}, sync="parameter-server", servers=2),
}


def recipe(folder: Path, steps: int) -> Recipe:
    """A CNN of 0.42M parameters, 256 images a step: 50 ms and more on one core."""
    data = folder / "images.npz"
    if not data.exists():
        draw = np.random.default_rng(0)
        images = draw.normal(size=(2048, 1, 28, 28)).astype(np.float32)
        np.savez(data, input=images, target=draw.integers(0, 10, size=2048))
    return Recipe(
        model=ModelSpec(kind="cnn"),
        data=DataSpec(source="arrays", path=str(data)),
        optimizer=OptimizerSpec(name="adamw", lr=1e-4),
        schedule=ScheduleSpec(kind="constant"),
        report=Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False),
        batch=256,
        shards=8,
        precision="float32",
        steps=steps,
    )


class Running:
    """An elastic run in a process of its own, seen through its folder."""

    def __init__(self, folder: Path, name: str, plan: Plan | None = None) -> None:
        plan = plan or Plan(mesh={"data": WORKERS})
        self.run, self.processes = folder / name, plan.workers + plan.server_processes
        (folder / f"{name}.plan.toml").write_text(plan.to_toml())
        (folder / f"{name}.toml").write_text(recipe(folder, 10**6).to_toml())
        self.log = self.run / "events.jsonl"
        how = ["--plan", str(folder / f"{name}.plan.toml")]
        command = [sys.executable, "-m", "shoal", "train", str(folder / f"{name}.toml"), *how]
        self.process = subprocess.Popen(
            [*command, "--elastic", "--run-dir", str(self.run), "--json"],
            stdout=subprocess.PIPE,  # one line at the end
            stderr=subprocess.DEVNULL,
        )
        self.until(lambda: self.step >= 20, "first steps")

    def until(self, true: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"no {what} of {self.run}")
            time.sleep(0.005)

    @property
    def step(self) -> int:
        return max((step for event, step in told_lately(self.log) if event == "committed"), default=0)

    def recovered(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if '"event": "recovered"' in line]

    def whole(self) -> bool:
        return len(roster.read(self.run)) == self.processes

    def kill(self, rank: int) -> float:
        """Seconds to the next committed step."""
        before = len(self.recovered())
        pid = roster.read(self.run)[rank].pid
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: len(self.recovered()) > before, "recovery")
        return float(self.recovered()[before]["time"]) - at

    def end(self) -> dict[str, Any]:
        """The result of the run."""
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=60)[0]
        result: dict[str, Any] = json.loads(said.splitlines()[-1])
        return result


def crash(folder: Path, faults: int, name: str = "crash", plan: Plan | None = None) -> dict[str, Any]:
    """With servers, only these are killed."""
    running, draw, took = Running(folder, name, plan), random.Random(0), []
    first = plan.workers if plan is not None and plan.server_processes else 0
    for number in range(faults):
        running.until(running.whole, "new worker")
        time.sleep(draw.uniform(0.3, 0.6))  # the moment of a fault is nobody's choice
        others = range(first + 1, running.processes)
        took.append(running.kill(first if number % 3 == 0 or not others else draw.choice(others)))
        print(f"  kill {number + 1}: {took[-1]:.3f} s", flush=True)
    redone = [event["redone"] for event in running.recovered()]
    running.end()
    leader = statistics.median(took[::3])
    found = {"seconds": took, "p50": statistics.median(took), "p99": p99(took)}
    return {**found, "rank 0 p50": leader, "redone": max(redone)}


def p99(took: list[float]) -> float:
    ordered = sorted(took)
    return ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]


def goodput(folder: Path, seconds: float) -> dict[str, Any]:
    running = Running(folder, "goodput")

    def rate(kills: bool, seconds: float) -> float:
        begun, first, killed = time.monotonic(), running.step, 0
        while (passed := time.monotonic() - begun) < seconds:
            if kills and passed > killed * EVERY_S:
                killed += 1
                running.kill(killed % len(roster.read(running.run)))
            time.sleep(0.05)
        return (running.step - first) / (time.monotonic() - begun)

    brief = min(seconds, CALM_S)
    calm, rough, again = rate(False, brief), rate(True, seconds), rate(False, brief)
    kills, result = len(running.recovered()), running.end()
    steps = int(result["steps"])
    print(f"  {kills} kills in {steps} steps; now as many steps without", flush=True)
    whole = train(recipe(folder, steps), Plan(mesh={"data": WORKERS}), run_dir=folder / "undisturbed")
    if whole["steps"] != steps:
        raise RuntimeError(f"the fault-free run has ended after {whole['steps']} of {steps} steps")
    told = _committed(running.log)
    return {
        "calm steps/s": [calm, again],
        "steps/s": rough,
        "goodput": rough / ((calm + again) / 2),
        "kills": kills,
        "steps": steps,
        "each step once": told == list(range(1, steps + 1)),
        "weights equal": result["weights_sha256"] == whole["weights_sha256"],
    }


def _committed(log: Path) -> list[int]:
    """The steps that the log tells of, in its order."""
    return [json.loads(line)["step"] for line in log.read_text().splitlines() if '"event": "committed"' in line]


HOSTS, HOST_KINDS = 3, ("agent", "leader", "cut")


OF_HOSTS = {
    "hosts": Plan(mesh={"data": HOSTS}),
    "hosts stage": Plan(mesh={"pipe": HOSTS}),
    "hosts server": Plan(mesh={"data": HOSTS - 1}, sync="parameter-server", servers=1),
}


def hosts(folder: Path, faults: int, name: str, plan: Plan) -> dict[str, Any]:
    place = folder / name
    given = (recipe(folder, 10**6), plan, None, place, None, None, None, None)
    events: list[dict[str, Any]] = []
    took: dict[str, list[float]] = {kind: [] for kind in HOST_KINDS}
    redone: dict[str, list[int]] = {kind: [] for kind in HOST_KINDS}
    draw = random.Random(0)

    def until(true: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            if time.monotonic() > end:
                raise RuntimeError(f"no {what}: {events[-5:]}")
            time.sleep(0.005)

    def hear(event: Any) -> None:
        if event["event"] != "committed":
            events.append(event)

    def recovered() -> list[dict[str, Any]]:
        return [event for event in list(events) if event["event"] == "recovered"]

    make = jobs(*given, hosts=HOSTS, least=1)
    with closing(Relay(HOSTS)) as network, EmulatedHosts(make, network, hear) as emulated:
        for number in range(HOSTS):
            emulated.start(number)
        until(lambda: len({entry.host for entry in roster.read(place)}) == HOSTS, "first workers")
        for number in range(faults * len(HOST_KINDS)):
            kind = HOST_KINDS[number % len(HOST_KINDS)]
            leader = emulated.leader(place)
            others = [host for host in range(HOSTS) if host != leader]
            serving = {int(entry.host[-1]) for entry in roster.read(place) if not entry.shards} - {leader}
            if serving and number % 2 == 0:
                others = sorted(serving)
            host = leader if kind == "leader" else draw.choice(others if kind == "agent" else range(HOSTS))
            spare = emulated.open(host) if kind != "cut" else None
            before = len(recovered())
            time.sleep(draw.uniform(0.1, 0.4))  # the moment of a fault is nobody's choice
            at = time.time()
            if spare is None:
                network.trouble(host, out=Trouble(cut=True), into=Trouble(cut=True))
            else:
                emulated.signal(host, signal.SIGKILL)
            until(lambda before=before: len(recovered()) > before, f"recovery from {kind}")
            event = recovered()[before]
            took[kind].append(float(event["time"]) - at)
            redone[kind].append(int(event["redone"]))
            print(f"  {kind} {number // len(HOST_KINDS) + 1}: {took[kind][-1]:.3f} s", flush=True)
            if spare is None:
                network.trouble(host, out=Trouble(), into=Trouble())
            else:
                emulated.start(host, spare)
            until(lambda: len({entry.host for entry in roster.read(place)}) == HOSTS, f"return after {kind}")
        emulated.ask_stop()
        emulated.result()
    found: dict[str, Any] = {"seconds": took}
    for kind, seconds in took.items():
        found |= {f"{kind} p50": statistics.median(seconds), f"{kind} p99": p99(seconds)}
        found[f"{kind} redone"] = max(redone[kind])
    return found


def calm(folder: Path, rounds: int, plan: Plan | None = None) -> dict[str, Any]:
    arms: dict[str, list[float]] = {"plain": [], "elastic": []}
    wanted = recipe(folder, 60)
    with Agent(PRELOAD) as agent:
        for number, arm in enumerate(turns(tuple(arms), rounds)):
            seconds: list[float] = []

            def listen(event: Any, seconds: list[float] = seconds) -> None:
                if event["event"] == "committed" and event["step"] > 10:
                    seconds.append(event["seconds"])

            run = train if arm == "plain" else train_elastic
            run(
                wanted,
                plan or Plan(mesh={"data": WORKERS}, states="replicated"),
                run_dir=Path(tempfile.mkdtemp(dir=folder)) / f"calm{number}",
                progress=listen,
                agent=agent,
            )
            arms[arm].append(statistics.median(seconds))
            print(f"  {arm}: {arms[arm][-1] * 1e3:.1f} ms", flush=True)
    ratios = [e / p for e, p in zip(arms["elastic"], arms["plain"], strict=True)]
    return {**arms, "ratio": statistics.median(ratios)}


def resizes(folder: Path) -> dict[str, Any]:
    running, pauses = Running(folder, "resize"), {}
    for workers in (2, 4, 1, 4, 3, 4):
        before = len(roster.read(running.run))
        done = resize(running.run, workers)
        pauses[f"{before} -> {workers}"] = done["pause_s"]
        time.sleep(0.5)
    lost = len(running.recovered())
    running.end()
    return {"pause_s": pauses, "steps lost": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--goodput-s", type=float, default=120.0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--only", default="crash,torchrun,ray,torchft,calm,resize,goodput")
    parser.add_argument("--peers-python", default=sys.executable, help="of an environment with ray, torchft and torch")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="3 faults, 1 round: to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.faults, args.rounds, args.restarts, args.goodput_s = 3, 1, 1, 20.0
    out = args.out or (None if args.quick else RESULTS)
    found: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as made:
        folder = Path(made)
        recipe(folder, 1)
        parts: dict[str, Callable[[], dict[str, Any] | None]] = {
            "crash": lambda: crash(folder, args.faults),
            **{name: partial(crash, folder, args.faults, name, plan) for name, plan in KINDS.items()},
            **{f"calm {name}": partial(calm, folder, args.rounds, plan) for name, plan in KINDS.items()},
            **{peer: partial(measure, peer, folder, args.peers_python, args.restarts, WORKERS) for peer in PEERS},
            "calm": lambda: calm(folder, args.rounds),
            "resize": lambda: resizes(folder),
            **{name: partial(hosts, folder, args.faults, name, plan) for name, plan in OF_HOSTS.items()},
            "goodput": lambda: goodput(folder, args.goodput_s),
        }
        for name in args.only.split(","):
            print(name, flush=True)
            if (measured := parts[name]()) is None:
                continue
            found[name] = {**measured, "load": os.getloadavg(), "machine": machine()}
            if name in PEERS and "crash" in found:
                found[name]["times the crash of ours"] = found[name]["p50"] / found["crash"]["p50"]
            print(f"  { ({k: v for k, v in found[name].items() if k not in ('seconds', 'machine')}) }", flush=True)
            if out is not None:
                out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
