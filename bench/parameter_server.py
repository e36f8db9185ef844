"""Parameter servers: against torch RPC on one host, two servers against one over limited links, and what schemes learn.

    python bench/parameter_server.py transfer              push + pull of 40 MiB by 2 workers, torch RPC alternating
    python bench/parameter_server.py links                 1 and 2 servers on emulated hosts (root only)
    python bench/parameter_server.py schemes DIR           accuracy by epoch on MNIST, each scheme beside plain SGD

In `transfer` and `links` the arms alternate in the same processes; a round is as slow as its slowest worker; figures
are medians over rounds, then over runs.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed import rpc

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from shoal.cluster.detect import usable_cores
from shoal.comm.group import HostGroup
from shoal.comm.launch import Agent
from shoal.comm.server.api import ParameterServer, Served
from shoal.comm.server.tcp import ServerThread, TcpServer, new_token

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
RATE = 0.1
Arms = dict[str, Callable[[], None]]


# --- against torch RPC --------------------------------------------------------------------------------------------


class _OnRpc:
    """The control: parameters in one process, behind torch RPC, one call to push and pull."""

    lock = threading.Lock()
    weights: ClassVar[list[torch.Tensor]] = []

    @staticmethod
    def hold(sizes: Sequence[int]) -> None:
        _OnRpc.weights = [torch.zeros(size) for size in sizes]

    @staticmethod
    def push_and_pull(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        with _OnRpc.lock:
            for weight, gradient in zip(_OnRpc.weights, gradients, strict=True):
                weight.add_(gradient, alpha=-RATE)
        return _OnRpc.weights


def transfer(group: HostGroup, sizes: Sequence[int], rounds: int, port: int) -> dict[str, list[float]]:
    """Ranks 0 and 1 are workers, rank 2 holds the servers that are not processes of their own. Seconds by round."""
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", num_worker_threads=4)
    rpc.init_rpc(f"rank{group.rank}", rank=group.rank, world_size=group.world, rpc_backend_options=options)
    token = group.gather(new_token() if group.rank == 2 else b"")[2]
    threads = [ServerThread(server, token=token) for server in range(2)] if group.rank == 2 else []
    if threads:
        _OnRpc.hold(sizes)
    addresses = json.loads(group.gather(json.dumps([thread.address for thread in threads]).encode())[2])
    found: dict[str, list[float]] = {}
    if group.rank < 2:
        found = _timed(group, _arms(group, sizes, Served(tuple(addresses), token)), rounds, sizes)
    else:
        for _ in range(4 * (rounds + 1) + 1):
            group.gather(b"")
    group.gather(b"")
    rpc.shutdown()
    for thread in threads:
        thread.close()
    return found


def _arms(group: HostGroup, sizes: Sequence[int], tcp: Served) -> tuple[Arms, dict[str, list[torch.Tensor]]]:
    gradients = [torch.ones(size) for size in sizes]
    weights = {name: [torch.nn.Parameter(torch.zeros(size)) for size in sizes] for name in ("shared memory", "tcp")}
    weights["shared memory, gradients held there"] = weights["shared memory"]
    weights["torch rpc"] = [torch.zeros(size) for size in sizes]

    def on(name: str, where: "HostGroup | Served") -> ParameterServer:
        optimizer = torch.optim.SGD(weights[name], lr=RATE)
        return ParameterServer(weights[name], optimizer, where, worker=group.rank, mode="async")

    def arm(server: ParameterServer, given: list[torch.Tensor]) -> None:
        server.push(given)
        server.pull()

    def over_rpc() -> None:
        weights["torch rpc"][:] = rpc.rpc_sync("rank2", _OnRpc.push_and_pull, args=(gradients,))

    shared, remote = on("shared memory", group), on("tcp", tcp)
    held = shared.hold_gradients()

    for gradient in held:  # as a backward pass would
        gradient.fill_(1.0)

    arms = {
        "torch rpc": over_rpc,
        "shared memory": lambda: arm(shared, gradients),  # copied in first
        "shared memory, gradients held there": lambda: arm(shared, held),
        "tcp": lambda: arm(remote, gradients),
    }
    return arms, weights


def _timed(
    group: HostGroup, made: tuple[Arms, dict[str, list[torch.Tensor]]], rounds: int, sizes: Sequence[int]
) -> dict[str, list[float]]:
    arms, weights = made
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):  # the first one warms up
        for name, arm in arms.items():
            group.gather(b"")
            begin = time.perf_counter()
            arm()
            if number:
                found[name].append(time.perf_counter() - begin)
    group.gather(b"")
    for name, held in weights.items():  # all have applied all pushes of this worker, and perhaps of the other
        pushes = (rounds + 1) * (2 if name.startswith("shared") else 1)  # both arms of shared memory have the same
        least, most = -RATE * 2 * pushes, -RATE * pushes
        for weight in held:
            value = float(weight.detach().view(-1)[-1])
            if not least - 1e-3 <= value <= most + 1e-3:
                raise SystemExit(f"{name} is wrong: {value} is not between {least} and {most}")
    return found


def run_transfer(args: argparse.Namespace) -> dict[str, Any]:
    import parameter_server as importable  # torch RPC finds functions by the name of their module

    sizes = [MIB] * (args.mebibytes // 4)  # float32
    runs, best = [], []
    for _ in range(args.runs):
        with Agent() as agent:
            told = agent.run(importable.transfer, (sizes, args.rounds, free_port()), workers=3, servers=2)
        slowest = {name: [max(pair) for pair in zip(told[0][name], told[1][name], strict=True)] for name in told[0]}
        runs.append({name: statistics.median(seconds) for name, seconds in slowest.items()})
        best.append({name: min(seconds) for name, seconds in slowest.items()})
        print({name: f"{1000 * seconds:.1f} ms" for name, seconds in runs[-1].items()}, flush=True)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    ratios = [{name: run["torch rpc"] / seconds for name, seconds in run.items()} for run in runs]
    against = {name: statistics.median(run[name] for run in ratios) for name in medians}
    least = {name: min(run[name] for run in best) for name in medians}
    print({name: f"{ratio:.2f}x torch rpc" for name, ratio in against.items()})
    print("best", {name: f"{1000 * s:.1f} ms, {least['torch rpc'] / s:.2f}x" for name, s in least.items()})
    return {
        "mebibytes": args.mebibytes,
        "seconds": medians,
        "against torch rpc": against,
        "best seconds": least,
        "runs": runs,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- over limited links -------------------------------------------------------------------------------------------


def over_links(
    rank: int, world: int, address: str, *, addresses: list[str], elements: int, rounds: int, token: str
) -> list[list[float]]:
    """Ranks 0 and 1 are workers, 2 and 3 are hosts of servers: [seconds with one server, with two]."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    secret = bytes.fromhex(token)
    ports = {1: 41000, 2: 42000}
    served = {n: Served(tuple(f"{addresses[2 + s]}:{ports[n] + s}" for s in range(n)), secret) for n in ports}
    threads = []
    for count in ports if rank >= 2 else ():
        if rank - 2 < count:
            server = TcpServer(rank - 2, token=secret, host=addresses[rank], port=ports[count] + rank - 2)
            threads.append(threading.Thread(target=server.run, daemon=True))
            threads[-1].start()
    dist.barrier()
    found: list[list[float]] = [[], []]
    arms = []
    for count in ports if rank < 2 else ():
        weights = torch.nn.Parameter(torch.zeros(elements))
        optimizer = torch.optim.SGD([weights], lr=RATE)
        arms.append((weights, ParameterServer([weights], optimizer, served[count], worker=rank, expected=2)))
    for number in range(rounds + 1):
        for which in range(2):
            dist.barrier()
            if rank >= 2:
                continue
            begin = time.perf_counter()
            arms[which][1].push([torch.ones(elements)])
            arms[which][1].pull()
            if number:
                found[which].append(time.perf_counter() - begin)
    dist.barrier()
    for weights, _ in arms:
        torch.testing.assert_close(weights.detach(), torch.full((elements,), -RATE * (rounds + 1)), rtol=1e-5, atol=0)
    return found


def run_links(args: argparse.Namespace) -> dict[str, Any]:
    from emulated_hosts import emulated_hosts, why_not

    problem = why_not()
    if problem:
        raise SystemExit(problem)
    runs = []
    with emulated_hosts(4, gbit_per_s=(args.gbit,)) as hosts:
        addresses = [hosts.address(host) for host in range(4)]
        for _ in range(args.runs):
            told = hosts.run(
                "parameter_server:over_links",
                ranks=(0, 1, 2, 3),
                addresses=addresses,
                elements=args.mebibytes * MIB // 4,
                rounds=args.rounds,
                token=new_token().hex(),
            )
            slowest = [[max(pair) for pair in zip(told[0][n], told[1][n], strict=True)] for n in range(2)]
            one, two = (statistics.median(seconds) for seconds in slowest)
            runs.append({"one server": one, "two servers": two, "gain": one / two})
            print({name: round(value, 3) for name, value in runs[-1].items()}, flush=True)
    gain = statistics.median(run["gain"] for run in runs)
    print(f"two servers: {gain:.2f}x one")
    return {"mebibytes": args.mebibytes, "gbit_per_s": args.gbit, "workers": 2, "gain": gain, "runs": runs}


# --- what they learn ----------------------------------------------------------------------------------------------

SCHEMES: dict[str, dict[str, Any]] = {
    "synchronous SGD (all-reduce)": {"sync": "exact"},
    "parameter server, synchronous": {"sync": "parameter-server", "servers": 2},
    "stale-synchronous, 3 steps": {"sync": "parameter-server", "servers": 2, "staleness": 3},
    "asynchronous": {"sync": "parameter-server", "servers": 2, "staleness": -1},
    "local, average every 8 steps": {"sync": "local", "average_every": 8},
}


def run_schemes(args: argparse.Namespace) -> dict[str, Any]:
    from shoal.recipe.plan import Plan
    from shoal.recipe.recipe import DataSpec, ModelSpec, OptimizerSpec, Recipe, ScheduleSpec
    from shoal.run.run import Run
    from shoal.train.api import PRELOAD, evaluate, train

    table: dict[str, list[dict[str, Any]]] = {name: [] for name in SCHEMES}
    with tempfile.TemporaryDirectory() as scratch, Agent(PRELOAD) as agent:
        for seed in range(args.seeds):
            recipe = Recipe(
                model=ModelSpec(kind="mlp", options={"hidden": [128]}),
                data=DataSpec(source="idx", path=str(args.data), validation=0.05),
                optimizer=OptimizerSpec(name="sgd", lr=0.1, options={"momentum": 0.9}),
                schedule=ScheduleSpec(kind="cosine", warmup_steps=50, final=0.02),
                batch=128,
                epochs=args.epochs,
                precision="float32",
                seed=seed,
            )
            for index, (name, options) in enumerate(SCHEMES.items()):
                folder = Path(scratch) / f"seed{seed}-scheme{index}"
                plan = Plan(mesh={"data": args.workers}, device="cpu", **options)
                result = train(recipe, plan, run_dir=folder, agent=agent)
                events = Run(folder).events()
                curve = [e["figures"]["accuracy"] for e in events if e["event"] == "evaluated"]
                stale = [e["staleness"] for e in events if e["event"] == "committed" and "staleness" in e]
                row = {
                    "seed": seed,
                    "validation accuracy by epoch": curve,
                    "test accuracy": evaluate(folder, split="test", agent=agent)["figures"]["accuracy"],
                    "weights_sha256": result["weights_sha256"],
                }
                if stale:
                    row["staleness"] = {
                        "max": max(s["max"] for s in stale),
                        "mean": statistics.fmean(s["mean"] for s in stale),
                    }
                table[name].append(row)
                print(f"{name:34}", row, flush=True)
    same = all(
        one["weights_sha256"] == other["weights_sha256"]
        for one, other in zip(*(table[name] for name in list(SCHEMES)[:2]), strict=True)
    )
    if not same:
        raise SystemExit("the synchronous server does not give the bits of all-reduce")
    return {"workers": args.workers, "epochs": args.epochs, "schemes": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    one = jobs.add_parser("transfer")
    one.add_argument("--mebibytes", type=int, default=40)
    one.add_argument("--rounds", type=int, default=15)
    two = jobs.add_parser("links")
    two.add_argument("--mebibytes", type=int, default=8)
    two.add_argument("--rounds", type=int, default=4)
    two.add_argument("--gbit", type=float, default=0.4)
    three = jobs.add_parser("schemes")
    three.add_argument("data", type=Path)
    three.add_argument("--epochs", type=int, default=3)
    three.add_argument("--seeds", type=int, default=2)
    three.add_argument("--workers", type=int, default=4)
    for job in (one, two):
        job.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    load = os.getloadavg()
    out = {"transfer": run_transfer, "links": run_links, "schemes": run_schemes}[args.job](args)
    out |= {
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "torch": torch.__version__,
        "load_average": load,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"parameter_server-{args.job}.json"
    file.write_text(json.dumps(out, indent=1))
    print("raw numbers:", file)


if __name__ == "__main__":
    main()
