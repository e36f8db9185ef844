"""How good the cost model's choice is: every algorithm measured over gloo, the chosen one against the best.

    python bench/collective_choice.py [--workers 2 3 4] [--seconds 100] [--quick]

In one set of processes: probe, choose for every collective and size, then measure. A first look finds what cannot be
the best (it takes more than twice as long as another, or where the time does not last, more than 1.25 times); the rest
takes turns, in orders that alternate, for as long as the case's share of the time lasts, so that short messages are
measured hundreds of times. A share is what is left of the seconds by the cases that are left. A time is that of the
slowest rank, and an arm's the lower quartile: what disturbs the machine makes times longer, never shorter. The best of
one half of the turns is held against the chosen one in the other half, both ways: the least of many noisy times is too
small, and would make any choice look bad. A choice is good when it takes at most 1.1 times as long as the best. Beside
it: the choice without the corrections that tuning measures; gloo's own collective always (the control); and how far the
two halves differ for one and the same algorithm, which is the noise: where it exceeds 1.1, a case says little of the
choice. The same choice is asked for on random topologies, where the loopback's clock is the truth.

How long it will take is said first, and what is left before each case; when the time is up, the cases that are left are
counted, not measured. ``--workers 3 --seconds 200`` asks for nearly 4 minutes, and takes them on cores that nobody else
uses. --quick (two ranks, three of the sizes, a tenth of the time) shows that it runs, and writes nothing.
"""

import argparse
import json
import math
import os
import platform
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import shoal.comm as comm
from shoal.cluster.topology import Speed, Topology
from shoal.comm.collectives import torch_own
from shoal.comm.collectives.actions import Program, block_sizes
from shoal.comm.collectives.choose import Choice, Option, choose
from shoal.comm.collectives.execute import carry_out
from shoal.comm.layout import ALIGNMENT
from shoal.comm.measuring.probing import Probed, usual
from shoal.comm.transports.contract import Transport, drive
from shoal.comm.transports.loopback import Loopback
from shoal.comm.transports.torch_group import TorchGroup

RESULTS = Path(__file__).parent / "results"
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter")
SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 19, 1 << 21, 1 << 23)  # only some of them are sizes that tuning measures
GOOD = 1.1
LOOKS = 4  # turns of the first look
FAR, NEAR = 2.0, 1.25  # times the shortest: what a look leaves out always, and where the time does not last
FEWEST, MOST = 12, 400  # turns of a case
PROBE_S = 4.0  # of links, at most, and of the tuning of each collective


def tensors(program: Program, rank: int, nbytes: int) -> tuple[list[torch.Tensor | None], list[int]]:
    sizes = block_sizes(program.collective, program.ranks, nbytes // 4)
    spans = program.spans(sizes, ALIGNMENT)
    made = []
    for chunks in (program.starts[rank], program.ends[rank]):
        made.append(torch.ones(sum(spans[c].stop - spans[c].start for c in chunks)) if len(chunks) else None)
    return made, sizes


def program_of(collective: str, option: Option, found: Probed, nbytes: int) -> Program:
    """What an option does; for the backend's own collective any program, whose tensors it takes."""
    own = option.algorithm == found.backend
    name, segments = ("direct", 1) if own else (option.algorithm, option.segments)
    program = choose(collective, nbytes, found.topology, only=(name,), segments=segments).program
    assert program is not None
    return program


def runner(transport: TorchGroup, program: Program, nbytes: int, own: bool) -> Callable[[], None]:
    (operand, result), sizes = tensors(program, transport.rank, nbytes)
    if own:
        return partial(torch_own.run, program.collective, transport.groups[0], operand, result, 0, "sum")
    return lambda: drive(carry_out(transport, program, operand, result, sizes=sizes))


class Clock:
    """The time that is left for cases, by rank 0's clock: all ranks hear the same."""

    def __init__(self, seconds: float, cases: int) -> None:
        self._end, self.cases = time.perf_counter() + seconds, cases

    def left(self) -> float:
        told = torch.tensor([self._end - time.perf_counter()], dtype=torch.float64)
        dist.broadcast(told, 0)
        return float(told)

    def share(self) -> float:
        """Of the next case."""
        self.cases -= 1
        return max(0.0, self.left() / (self.cases + 1))


def timed(arms: dict[str, Callable[[], None]], clock: Clock, fewest: int, most: int, end: float) -> dict:
    """Seconds of the slowest rank, by arm and turn; the same on all ranks. After the ``fewest`` turns, no more begin
    once the clock has less than ``end`` left."""
    own: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(most + 1):  # the first is to warm up
        if number > fewest and number % 4 == 1 and clock.left() < end:
            break  # after a multiple of 4: both halves, even and odd turns, have had both orders
        for name in arms if number // 2 % 2 else reversed(list(arms)):
            dist.barrier()
            begin = time.perf_counter()
            arms[name]()
            if number:
                own[name].append(time.perf_counter() - begin)
    table = torch.tensor(list(own.values()), dtype=torch.float64)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return dict(zip(own, table.tolist(), strict=True))


def worth_measuring(seconds: dict[str, float], kept: set[str], turn_s: float, share_s: float) -> set[str]:
    """Of arms that a look has found to take so long: those that may be the best. ``turn_s``: what a turn of all takes;
    when the fewest turns of what is left do not fit into the share, only what comes near to the shortest stays."""
    least = min(seconds.values())
    left = {name for name, each in seconds.items() if name in kept or each < FAR * least}
    takes = turn_s * sum(seconds[name] for name in left) / sum(seconds.values())
    if FEWEST * takes > share_s:
        left = {name for name in left if name in kept or seconds[name] < NEAR * least}
    return left


def case(transport: TorchGroup, collective: str, nbytes: int, found: Probed, clock: Clock) -> dict:
    share = clock.share()
    began = clock.left()
    tuned = comm.plan(collective, nbytes, found)
    plain = choose(collective, nbytes, found.topology, curves=found.curves)
    options = [Option(tuned.algorithm, tuned.segments, tuned.predicted_s), *tuned.alternatives]
    if str(Option(plain.algorithm, plain.segments, 0.0)) not in map(str, options):
        options.append(Option(plain.algorithm, plain.segments, plain.predicted_s))
    names: dict[str, str] = {}  # of options that do the same, the first stands for all
    arms: dict[str, Callable[[], None]] = {}
    alike: dict[object, str] = {}
    for option in options:
        program = program_of(collective, option, found, nbytes)
        done = found.backend if option.algorithm == found.backend else (program.rounds, program.shares, program.chunks)
        names[str(option)] = alike.setdefault(done, str(option))
        if names[str(option)] == str(option):
            arms[str(option)] = runner(transport, program, nbytes, own=option.algorithm == found.backend)
    kept = {names[str(option)] for option in (Option(c.algorithm, c.segments, 0.0) for c in (tuned, plain))}
    kept |= {names[found.backend]} & set(arms) if found.backend in names else set()
    look = timed(arms, clock, 2, LOOKS, began - share / 3)
    shortest = {name: min(each) for name, each in look.items()}
    spent = began - clock.left()
    turn_s = spent / (1 + len(look[next(iter(look))]))
    left = worth_measuring(shortest, kept, turn_s, share - spent)
    times = timed({name: act for name, act in arms.items() if name in left}, clock, FEWEST, MOST, began - share)
    halves = [{name: usual(each[first::2]) for name, each in times.items()} for first in (0, 1)]
    best = [min(half, key=lambda name: half[name]) for half in halves]

    def regret(name: str) -> float:
        """The chosen over the best of the other half; the geometric mean of both ways."""
        name = names[name]
        return max(1.0, math.prod(halves[i][name] / halves[i][best[1 - i]] for i in (0, 1)) ** 0.5)

    def chosen(choice: Choice) -> str:
        return str(Option(choice.algorithm, choice.segments, 0.0))

    return {
        "collective": collective,
        "nbytes": nbytes,
        "chosen": chosen(tuned),
        "best": best,
        "regret": regret(chosen(tuned)),
        "regret_untuned": regret(chosen(plain)),
        "regret_own": regret(found.backend) if found.backend in names else None,
        "noise": max(halves[0][best[0]] / halves[1][best[0]], halves[1][best[0]] / halves[0][best[0]]),
        "predicted_s": tuned.predicted_s,
        "turns": len(times[best[0]]),
        "measured_s": {name: usual(each) for name, each in times.items()},
        "left_out_s": {name: shortest[name] for name in shortest if name not in times},
    }


def probe_s(seconds: float) -> float:
    return min(PROBE_S, seconds / 10)


def rank_main(rank: int, world: int, port: int, seconds: float, sizes: tuple[int, ...], out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found = comm.probe(tune=COLLECTIVES, seconds=probe_s(seconds))
    transport = TorchGroup()
    even = [nbytes // (4 * world) * 4 * world for nbytes in sizes]  # torch's own collectives want equal blocks
    clock, cases = Clock(seconds, len(COLLECTIVES) * len(even)), []
    for nbytes in even:
        for name in COLLECTIVES:
            if (left := clock.left()) <= 0:
                break
            if rank == 0:
                print(f"{world} ranks, {clock.cases} cases to go, {left:.0f} s left: {name} of {nbytes}", flush=True)
            cases.append(case(transport, name, nbytes, found, clock))
    if rank == 0 and clock.cases:
        print(f"{clock.cases} cases were not measured: the time was up")
    if rank == 0:
        probed = {"probe_s": found.seconds, "residual": found.residual, "cases": cases}
        Path(out).write_text(json.dumps({"workers": world, **probed}))
    dist.destroy_process_group()


def measured(world: int, seconds: float, sizes: tuple[int, ...]) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f".choice-{os.getpid()}.json"
    try:
        mp.spawn(rank_main, (world, port, seconds, sizes, str(out)), nprocs=world)
        return json.loads(out.read_text())
    finally:
        out.unlink(missing_ok=True)


def simulated(topology: Topology, program: Program, nbytes: int) -> float:
    def steps(transport: Transport):
        (operand, result), sizes = tensors(program, transport.rank, nbytes)
        return carry_out(transport, program, operand, result, sizes=sizes)

    return Loopback(topology).run(steps).seconds


def random_topology(draw: random.Random) -> Topology:
    ranks = draw.randint(2, 8)
    if draw.random() < 0.3:
        name = draw.choice(("dgx1-p100", "dgx1-v100"))
        return Topology.preset(name, sorted(draw.sample(range(8), ranks)))
    hosts = min(ranks, draw.choice((1, 2, 3)))
    inside = Speed(10 ** draw.uniform(9, 10.5), 10 ** draw.uniform(-6, -4))
    between = [Speed(10 ** draw.uniform(8, 9.5), 10 ** draw.uniform(-5, -3.7)) for _ in range(draw.choice((1, 1, 2)))]
    return Topology.synthetic(ranks, hosts=hosts, inside=inside, between=between)


def on_loopback(count: int) -> dict:
    draw, regrets = random.Random(0), []
    for _ in range(count):
        topology, collective = random_topology(draw), draw.choice(COLLECTIVES)
        nbytes = 4 * round(4 ** draw.uniform(4, 10))
        choice = choose(collective, nbytes, topology)
        options = [Option(choice.algorithm, choice.segments, 0.0), *choice.alternatives]
        times = []
        for option in options[:6]:
            program = choose(collective, nbytes, topology, only=(option.algorithm,)).program
            assert program is not None
            times.append(simulated(topology, program, nbytes))
        regrets.append(times[0] / min(times))
    return {"cases": count, "good": sum(r <= GOOD for r in regrets) / count, "worst": max(regrets)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seconds", type=float, default=100.0, help="of all measured turns, about")
    parser.add_argument("--quick", action="store_true", help="two ranks, a tenth of the time")
    parser.add_argument("--topologies", type=int, default=60)
    args = parser.parse_args()
    began = time.perf_counter()
    report: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    workers, seconds = ([2], args.seconds / 10) if args.quick else (args.workers, args.seconds / len(args.workers))
    whole = len(workers) * (seconds + (1 + len(COLLECTIVES)) * probe_s(seconds))
    print(f"about {whole:.0f} s: {seconds:.0f} s of turns at each of {workers} ranks, and probes", flush=True)
    report["runs"] = [measured(world, seconds, SIZES[1::2] if args.quick else SIZES) for world in workers]
    report["load_average"] = os.getloadavg()
    cases = [each for run in report["runs"] for each in run["cases"]]
    for name in ("regret", "regret_untuned", "regret_own", "noise"):
        values = [each[name] for each in cases if each[name] is not None]
        report[name] = {
            "good": sum(value <= GOOD for value in values) / len(values),
            "median": statistics.median(values),
            "worst": max(values),
        }
        print(f"{name}: within 10 % of the best in {report[name]['good']:.0%} of {len(values)} cases, "
              f"median {report[name]['median']:.2f}, worst {report[name]['worst']:.2f}")  # fmt: skip
    for each in cases:
        if each["regret"] > GOOD:
            print(f"  missed: {each['collective']} of {each['nbytes']}: {each['chosen']}, best {each['best']}, "
                  f"{each['regret']:.2f}")  # fmt: skip
    report["loopback"] = on_loopback(args.topologies)
    print(f"loopback: {report['loopback']}; all in {time.perf_counter() - began:.0f} s")
    if args.quick:
        return 0  # what stands in bench/results is of the full mode
    ranks = f"-{workers[0]}-ranks" if len(workers) == 1 else ""
    (RESULTS / f"collective_choice{ranks}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
