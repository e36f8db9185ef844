"""Two hosts with a limited network between them: hierarchy against gloo's flat ring, two interfaces against one.

    python bench/hosts.py [--mebibytes 4 16] [--runs 3]

The hosts are namespaces of this machine (tests/emulated_hosts.py; root only), so that all ranks share its processors.
In each run the arms alternate in the same processes; a time is that of the slowest rank; figures are medians of runs.
Bytes are those that the kernel counted at the interfaces of the host that sent most, per all-reduce, beside the
program's own account of what leaves a host.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from emulated_hosts import emulated_hosts, interface_bytes, why_not

from shoal.cluster.topology import Speed, Topology
from shoal.comm.collectives.actions import Program
from shoal.comm.collectives.choose import choose
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.execute import carry_out
from shoal.comm.collectives.multipath import Fit, Lane, over_lane, program
from shoal.comm.collectives.registry import build as build_program
from shoal.comm.collectives.traffic import traffic
from shoal.comm.native import build
from shoal.comm.transports.contract import drive
from shoal.comm.transports.torch_group import TorchGroup

RESULTS = Path(__file__).parent / "results"
GBIT = 1e9 / 8
HEADERS = 1.08  # what the kernel counts over payload: Ethernet, IP and TCP headers, and the acknowledgements going back
PLACES = {"neighbours": (0, 0, 1, 1), "in turn": (0, 1, 0, 1)}  # the host of each of 4 ranks
LATENCY_S = 100e-6  # of an interface here, by order of magnitude; what is asked of the model is its large-message order


def two_hosts(places: Sequence[int], rates: Sequence[float]) -> Topology:
    """The topology that the emulation stands for. Rates are in gigabits a second."""
    between = [Speed(rate * GBIT, LATENCY_S) for rate in rates]
    first = [rank for rank, host in enumerate(places) if host == 0]
    second = [rank for rank, host in enumerate(places) if host == 1]
    order = [*first, *second]
    return Topology.synthetic(len(places), hosts=2, inside=Speed(1e9, 5e-5), between=between).subset(
        [order.index(rank) for rank in range(len(places))]
    )


def leaving_bytes(made: Program, nbytes: int, places: Sequence[int]) -> int:
    """What the program sends out of the host that sends most."""
    out = [0, 0]
    for (origin, to, _), count in traffic(made, nbytes, 4).by_line.items():
        if places[origin] != places[to]:
            out[places[origin]] += count
    return max(out)


def start(rank: int, world: int, address: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)


def timed(arms: dict[str, Callable[[], None]], expected: Callable[[], bool], rounds: int) -> dict[str, list]:
    """Seconds of each arm, round by round in turns, with bytes sent by each interface; the first round warms up."""
    found: dict[str, list] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            dist.barrier()
            before = interface_bytes()
            begin = time.perf_counter()
            arm()
            seconds = time.perf_counter() - begin
            if not expected():
                raise AssertionError(f"{name}: the sums are wrong")
            dist.barrier()
            sent = {eth: now[1] - before[eth][1] for eth, now in interface_bytes().items() if eth.startswith("eth")}
            if number:
                found[name].append({"seconds": seconds, "sent": sent})
    return found


def operand(rank: int, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Small whole numbers, whose sums are exact; and room for the result."""
    mine = (torch.arange(nbytes // 4, dtype=torch.float32) % 251) + rank
    return mine, torch.empty_like(mine)


def hierarchy(rank: int, world: int, address: str, places: list[int], nbytes: int, segments: int, rounds: int) -> dict:
    """A job of a rank: gloo's all-reduce, and two_level over gloo's messages."""
    start(rank, world, address)
    mine, result = operand(rank, nbytes)
    right = mine * world + sum(range(world)) - rank * world
    transport = TorchGroup()
    made = build_program("all_reduce", "two_level", world, hosts=places, segments=segments)

    def flat() -> None:
        result.copy_(mine)
        dist.all_reduce(result)

    def two_level() -> None:
        drive(carry_out(transport, made, mine, result))

    found = timed({"gloo": flat, "two_level": two_level}, lambda: torch.equal(result, right), rounds)
    dist.destroy_process_group()
    return found


def by_hier(rank: int, world: int, address: str, places: list[int], nbytes: int, rounds: int) -> dict:
    """A job of a rank: gloo's all-reduce, and that of Shoal's hier backend."""
    import shoal.comm

    shoal.comm.install()
    torch.set_num_threads(1)
    dist.init_process_group("hier", init_method=address, rank=rank, world_size=world)
    plain = dist.new_group(backend="gloo")
    mine, result = operand(rank, nbytes)
    right = mine * world + sum(range(world)) - rank * world

    def reduced(group: dist.ProcessGroup | None) -> Callable[[], None]:
        def arm() -> None:
            result.copy_(mine)
            dist.all_reduce(result, group=group)

        return arm

    found = timed({"gloo": reduced(plain), "hier": reduced(None)}, lambda: torch.equal(result, right), rounds)
    dist.destroy_process_group()
    return found


def interfaces(rank: int, world: int, address: str, rates: list[float], nbytes: int, rounds: int) -> dict:
    """A job of a rank: an all-reduce over each interface alone, then over both, with shares from what was seen."""
    start(rank, world, address)
    groups = []
    for interface in range(len(rates)):
        os.environ["GLOO_SOCKET_IFNAME"] = f"eth{interface}"
        groups.append(dist.new_group(backend="gloo"))
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    transport = TorchGroup(groups)
    links = two_hosts((0, 1), rates)
    base = build_program("all_reduce", "two_shot", world)
    lanes = [over_lane(base, links, lane) for lane in range(len(rates))]
    mine, result = operand(rank, nbytes)
    right = mine * world + sum(range(world)) - rank * world

    def arm(made: Program) -> Callable[[], None]:
        return lambda: drive(carry_out(transport, made, mine, result))

    alone = {f"eth{lane}": arm(made) for lane, made in enumerate(lanes)}
    found = timed(alone, lambda: torch.equal(result, right), rounds)
    slowest = torch.tensor([statistics.median(each["seconds"] for each in times) for times in found.values()])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # all ranks must come to the same shares
    guess = Fit(tuple(Lane(rate * GBIT, LATENCY_S) for rate in rates))
    fit = guess.observed([nbytes] * len(rates), slowest.tolist()).observed([nbytes] * len(rates), slowest.tolist())
    parts = fit.split(nbytes)
    both = program(lanes, parts)
    found |= timed({"both": arm(both)}, lambda: torch.equal(result, right), rounds)
    dist.destroy_process_group()
    return {**found, "parts": parts, "claimed": [traffic(both, nbytes, 4).on_lane(lane) // 2 for lane in range(2)]}


def slowest(found: list[dict], arm: str) -> float:
    """The median over rounds of the slowest rank's seconds."""
    rounds = zip(*(rank[arm] for rank in found), strict=True)
    return statistics.median(max(each["seconds"] for each in ranks) for ranks in rounds)


def sent(found: list[dict], arm: str, interface: str) -> int:
    """The median over rounds of the bytes that the busiest host sent; ranks of a host see the same counters."""
    rounds = zip(*(rank[arm] for rank in found), strict=True)
    return round(statistics.median(max(each["sent"][interface] for each in ranks) for ranks in rounds))


def measure_hierarchy(mebibytes: float, places: Sequence[int], runs: int, rounds: int, hier: bool) -> dict:
    nbytes = round(mebibytes * 2**20)
    links = two_hosts(places, (1.0,))
    choice = choose("all_reduce", nbytes, links, only=("two_level",))
    made = build_program("all_reduce", "two_level", 4, hosts=list(places), segments=choice.segments)
    ring = build_program("all_reduce", "ring", 4)
    ratios, times = [], []
    job, name = ("hosts:by_hier", "hier") if hier else ("hosts:hierarchy", "two_level")
    more = {} if hier else {"segments": choice.segments}
    with emulated_hosts(2, (1.0,)) as hosts:
        for _ in range(runs):
            found = hosts.run(job, places, places=list(places), nbytes=nbytes, rounds=rounds, **more)
            gloo, ours = slowest(found, "gloo"), slowest(found, name)
            ratios.append(gloo / ours)
            times.append((gloo, ours))
    return {
        "arm": name,
        "mebibytes": mebibytes,
        "segments": choice.segments,
        "gloo_s": statistics.median(gloo for gloo, _ in times),
        f"{name}_s": statistics.median(ours for _, ours in times),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "predicted_ratio": cost(ring, nbytes, links).seconds / cost(made, nbytes, links).seconds,
        "gloo_sent": sent(found, "gloo", "eth0"),
        "sent": sent(found, name, "eth0"),
        "claimed": leaving_bytes(made, nbytes, places),
        "ring_claimed": leaving_bytes(ring, nbytes, places),
    }


def measure_interfaces(mebibytes: float, rates: Sequence[float], runs: int, rounds: int) -> dict:
    nbytes = round(mebibytes * 2**20)
    rows = []
    with emulated_hosts(2, rates) as hosts:
        for _ in range(runs):
            found = hosts.run("hosts:interfaces", (0, 1), rates=list(rates), nbytes=nbytes, rounds=rounds)
            speeds = {arm: nbytes / slowest(found, arm) for arm in ("eth0", "eth1", "both")}
            rows.append({**speeds, "share_of_sum": speeds["both"] / (speeds["eth0"] + speeds["eth1"])})
    return {
        "mebibytes": mebibytes,
        "gbit_per_s": list(rates),
        "parts": found[0]["parts"],
        "bytes_per_s": {arm: statistics.median(row[arm] for row in rows) for arm in ("eth0", "eth1", "both")},
        "share_of_sum": statistics.median(row["share_of_sum"] for row in rows),
        "shares_of_sum": [row["share_of_sum"] for row in rows],
        "share_of_wire": statistics.median(row["both"] for row in rows) / (sum(rates) * GBIT),
        "claimed": found[0]["claimed"],
        "sent": [sent(found, "both", f"eth{lane}") for lane in range(2)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=float, nargs="+", default=[0.0625, 1, 4, 16])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hier", action="store_true", help="also Shoal's hier backend, where it is built")
    args = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"not measured: {reason}")
        return 1
    if args.hier and build.backend() is None:  # compiled here, once, rather than by the ranks against their time limit
        print("hier is not measured: its compiled part is not there")
        args.hier = False
    report: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
        "hierarchy": [],
    }
    for name, places in PLACES.items():
        for mebibytes in args.mebibytes:
            for hier in (False, True)[: 1 + args.hier]:
                row = measure_hierarchy(mebibytes, places, args.runs, args.rounds, hier)
                report["hierarchy"].append({"ranks": name, **row})
                print(f"ranks {name}, {mebibytes:g} MiB: {row['arm']} {row['ratio']:.2f}x gloo's flat ring "
                      f"(predicted {row['predicted_ratio']:.2f}x for long ones); a host sent {row['sent']} bytes, "
                      f"claimed {row['claimed']}; gloo's ring sent {row['gloo_sent']}", flush=True)  # fmt: skip
    report["interfaces"] = measure_interfaces(max(args.mebibytes), (1.0, 0.4), args.runs, args.rounds)
    both = report["interfaces"]
    print(f"two interfaces: {both['share_of_sum']:.2f} of the sum of both alone, {both['share_of_wire']:.2f} of the "
          f"wire; sent {both['sent']}, claimed {both['claimed']}")  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "hosts.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
