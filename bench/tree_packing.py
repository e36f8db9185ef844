"""Packed trees against their bound and against rings, for every subset of a DGX-1.

    python bench/tree_packing.py [--mebibytes 1024]

For every set of GPUs of both machines: the exact bound over NVLink (or over all links, where NVLink does not join
them), the rate of the trees that are kept, and what the cost model predicts for an all-reduce of that size by those
trees, and by as many rings as there are over NVLink (one over PCIe where there is none), as NCCL builds them. Sets that
are alike, up to the numbers of the GPUs, are computed once.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

from shoal.cluster.topology import Topology
from shoal.comm.collectives import packing, ring_packing
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.registry import build

RESULTS = Path(__file__).parent / "results"
SEGMENTS = (16, 32, 64)
# Measured by others on a DGX-1 V100, GB/s of the tensor for 1 GiB: NCCL on the first n GPUs (VIA-Research/vTrain).
NCCL = {2: 22.6, 3: 33.9, 4: 56.9, 5: 23.2, 6: 27.4, 7: 50.8, 8: 76.9}


def alike(topology: Topology) -> tuple:
    """The same for two sets of GPUs whose links are alike."""
    rates = {(x.source, x.target, x.lane): (x.bytes_per_s, x.kind) for x in topology.links}
    crossed = {(x.source, x.target, x.lane): len(x.through) for x in topology.links}
    found = []
    for order in itertools.permutations(range(topology.size)):
        where = {rank: place for place, rank in enumerate(order)}
        found.append(
            tuple(sorted((where[a], where[b], lane, *rates[a, b, lane], crossed[a, b, lane]) for a, b, lane in rates))
        )
    return min(found)


def row(topology: Topology, nbytes: int) -> dict:
    out: dict = {}
    for collective in ("broadcast", "all_reduce"):
        packed = packing.pack(topology, collective)
        out[collective] = {
            "bound_gb_s": packed.bound_bytes_per_s / 1e9,
            "packed_gb_s": packed.bytes_per_s / 1e9,
            "trees": len(packed.trees),
        }
    programs = [packing.program(packed, segments) for segments in SEGMENTS]
    trees = max(cost(made, nbytes, topology).bytes_per_s for made in programs)
    orders = ring_packing.rings(topology)
    ring = (
        ring_packing.program("all_reduce", topology, orders) if orders else build("all_reduce", "ring", topology.size)
    )
    rings = cost(ring, nbytes, topology).bytes_per_s
    return out | {"rings": len(orders), "trees_gb_s": trees / 1e9, "rings_gb_s": rings / 1e9, "gain": trees / rings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=float, default=1024)
    parser.add_argument("--machines", nargs="+", default=["dgx1-v100", "dgx1-p100"])
    args = parser.parse_args()
    report: dict = {"mebibytes": args.mebibytes}
    for name in args.machines:
        known: dict[tuple, dict] = {}
        rows = []
        for count in range(2, 9):
            for gpus in itertools.combinations(range(8), count):
                topology = Topology.preset(name, gpus)
                nvlink = tuple(sorted((x.source, x.target, x.bytes_per_s) for x in topology.links if x.lane == 0))
                key = (count, nvlink, tuple(len(x.through) for x in topology.links)) if count > 6 else alike(topology)
                if key not in known:
                    known[key] = row(topology, round(args.mebibytes * 2**20))
                rows.append({"gpus": list(gpus), **known[key]})
        report[name] = rows
        share = [r[c]["packed_gb_s"] / r[c]["bound_gb_s"] for r in rows for c in ("broadcast", "all_reduce")]
        gains = [r["gain"] for r in rows]
        faster, slower = sum(gain > 1.05 for gain in gains), sum(gain < 0.95 for gain in gains)
        print(f"{name}: {len(rows)} sets of GPUs ({len(known)} different); trees reach {min(share):.3f} to "
              f"{max(share):.3f} of the bound; all-reduce against rings: median {statistics.median(gains):.2f}x, "
              f"up to {max(gains):.2f}x, faster for {faster} sets, slower for {slower}")  # fmt: skip
        for r in rows:
            if r["gpus"] == list(range(len(r["gpus"]))):
                nccl = f", NCCL measured {NCCL[len(r['gpus'])]:.1f}" if name == "dgx1-v100" else ""
                print(f"  first {len(r['gpus'])}: bound {r['all_reduce']['bound_gb_s']:.1f}, "
                      f"trees {r['trees_gb_s']:.1f}, {r['rings']} rings {r['rings_gb_s']:.1f}{nccl} GB/s")  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tree_packing.json").write_text(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
