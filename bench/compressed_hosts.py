"""Two hosts with a limited network between them: compressed all-reduce against gloo's, in the same processes.

    python bench/compressed_hosts.py [--mebibytes 16] [--gbit 1] [--runs 3]

The hosts are namespaces of this machine (tests/emulated_hosts.py; root only), so that both ranks share its processors.
A time is that of the slower rank, the median of rounds and of runs; bytes are those that the kernel counted leaving a
host. Predicted is `shoal.comm.worth_it`, from the speed of the compressor here and the rate of the link.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from emulated_hosts import emulated_hosts, why_not
from hosts import GBIT, HEADERS, start, timed

import shoal.comm
from shoal.comm.compression.compressor import COMPRESSORS
from shoal.comm.compression.low_rank import squarest
from shoal.comm.compression.worth import measured_speed

RESULTS = Path(__file__).parent / "results"


def compressed(rank: int, world: int, address: str, nbytes: int, rounds: int, bytes_per_s: float) -> dict:
    """A job of a rank: gloo's all-reduce, and every compressor's."""
    start(rank, world, address)
    mine = torch.randn(nbytes // 4, generator=torch.Generator().manual_seed(rank))
    result = torch.empty_like(mine)
    compressors = {name: make() for name, make in COMPRESSORS.items()}

    def plain() -> None:
        result.copy_(mine)
        dist.all_reduce(result)

    def squeezed(name: str) -> Callable[[], None]:
        def arm() -> None:
            result.copy_(mine)
            shoal.comm.compressed_all_reduce(result, compressors[name])

        return arm

    arms = {"gloo": plain, **{name: squeezed(name) for name in compressors}}
    found = timed(arms, lambda: bool(result.isfinite().all()), rounds)
    shapes = squarest(nbytes // 4)
    claimed = {name: c.bytes_sent(nbytes // 4, world, shapes) for name, c in compressors.items()}
    cpu = torch.device("cpu")
    speeds = {name: measured_speed(c.method, cpu) for name, c in compressors.items()}
    verdicts = {
        name: shoal.comm.worth_it(
            compressors[name], nbytes, bytes_per_s, speed.compress, world, open_bytes_per_s=speed.open
        )
        for name, speed in speeds.items()
    }
    dist.destroy_process_group()
    return {
        "found": found,
        "claimed": {"gloo": 2 * nbytes * (world - 1) // world, **claimed},
        "predicted": {
            name: [v.yes, v.plain_s / v.compressed_s if v.compressed_s else 0.0] for name, v in verdicts.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mebibytes", type=int, default=16)
    parser.add_argument("--gbit", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    nbytes, load = args.mebibytes << 20, os.getloadavg()
    runs = []
    with emulated_hosts(2, (args.gbit,)) as hosts:
        for _ in range(args.runs):
            job = {"nbytes": nbytes, "rounds": 3, "bytes_per_s": args.gbit * GBIT}
            runs.append(hosts.run("compressed_hosts:compressed", (0, 1), **job))
    rows = []
    for name, claimed in runs[0][0]["claimed"].items():
        times, ratios, sent = [], [], []
        for ranks in runs:
            rounds = [max(pair) for pair in zip(*(_seconds(rank, name) for rank in ranks), strict=True)]
            plain = [max(pair) for pair in zip(*(_seconds(rank, "gloo") for rank in ranks), strict=True)]
            times.append(statistics.median(rounds))
            ratios.append(statistics.median(p / r for p, r in zip(plain, rounds, strict=True)))
            sent.append(statistics.median(one["sent"]["eth0"] for one in ranks[0]["found"][name]))
        row = {"arm": name, "seconds": statistics.median(times), "times_faster": statistics.median(ratios)}
        row |= {"sent": statistics.median(sent), "claimed": claimed}
        row["predicted"] = statistics.median(r[0]["predicted"][name][1] for r in runs) if name != "gloo" else 1.0
        rows.append(row)
        print(
            f"{name:9} {row['seconds'] * 1e3:7.1f} ms  {row['times_faster']:5.2f}x gloo, predicted "
            f"{row['predicted']:.2f}x  sent {row['sent'] / 1e6:6.2f} MB, claimed {claimed / 1e6:6.2f} "
            f"(headers: up to {HEADERS} times)"
        )
    file = RESULTS / "compressed_hosts.json"
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    out = {"machine": machine, "torch": torch.__version__, "load_average": load, "nbytes": nbytes, "gbit": args.gbit}
    file.write_text(json.dumps({**out, "rows": rows, "runs": runs}, indent=1))
    print("raw numbers:", file)


def _seconds(rank: dict, name: str) -> list[float]:
    return [one["seconds"] for one in rank["found"][name]]


if __name__ == "__main__":
    main()
