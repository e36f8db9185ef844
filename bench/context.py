"""Ring attention over two workers, beside attention over whole sequences in one process.

    python bench/context.py [--lengths 1024 4096 8192] [--repeats 5]

Forward and backward pass of one causal attention layer (4 heads of 64, float32), each arm with one thread a worker, in
turns: one process with torch's fused attention; the ring cut in zigzag; the ring cut in contiguous pieces, where the
last worker does most of the work. Beside the seconds: bytes that each worker sends, and what it keeps of a sequence for
the backward pass, both counted. Medians; raw numbers to bench/results/context.json.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from shoal.comm.group import HostGroup
from shoal.comm.launch import Agent
from shoal.comm.tensors import make_collectives
from shoal.parallel.context.ring import Ring
from shoal.parallel.context.slices import contiguous, zigzag

RESULTS = Path(__file__).parent / "results"
HEADS, SIZE = 4, 64


def passes(attend, parts: torch.Tensor) -> tuple[float, int]:
    """Seconds of a forward and a backward pass, and the bytes kept between them."""
    q, k, v = (part.requires_grad_() for part in parts.unbind())
    kept: list[int] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.nbytes)
        return t

    begun = time.perf_counter()
    with saved_tensors_hooks(keep, lambda t: t):
        out = attend(q, k, v)
    out.sum().backward()
    return time.perf_counter() - begun, sum(kept)


def draw(length: int) -> torch.Tensor:
    return torch.randn(3, 1, HEADS, length, SIZE, generator=torch.Generator().manual_seed(0))


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def work(group: HostGroup, lengths: list[int], repeats: int) -> list[dict]:
    collectives = make_collectives(group)
    ring = Ring.of(group, True)
    rows = []
    for length in lengths:
        for repeat in range(repeats + 1):
            for arm in ("whole", "zigzag", "contiguous"):
                collectives.barrier()
                before = _sent(group)
                if arm == "whole":
                    seconds, kept = passes(fused, draw(length)) if group.rank == 0 else (0.0, 0)
                else:
                    ring.slices = (zigzag if arm == "zigzag" else contiguous)(length, group.world)
                    mine = ring.own(draw(length), 3)
                    collectives.barrier()
                    before = _sent(group)
                    seconds, kept = passes(lambda q, k, v: ring.attention(q, k, v, causal=True), mine)
                if repeat:  # the first one warms up
                    sent = _sent(group) - before
                    rows.append({"length": length, "arm": arm, "seconds": seconds, "kept": kept, "sent": sent})
    return rows


def _sent(group: HostGroup) -> float:
    return sum(total.sent_bytes for place, total in group.counters.totals().items() if place[0] == "stage send")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with Agent() as agent:
        by_rank = agent.run(work, (args.lengths, args.repeats), workers=2)
    table = []
    for length in args.lengths:
        row: dict = {"length": length}
        for arm in ("whole", "zigzag", "contiguous"):
            found = [[r for r in rows if (r["length"], r["arm"]) == (length, arm)] for rows in by_rank]
            slowest = [max(r["seconds"] for r in together) for together in zip(*found, strict=True)]
            row[f"{arm}_s"] = statistics.median(slowest)
            row[f"{arm}_kept_bytes"] = max(rows[0]["kept"] for rows in found)
            row[f"{arm}_sent_bytes"] = max(rows[0]["sent"] for rows in found)
        row["speed_up"] = row["whole_s"] / row["zigzag_s"]
        row["kept_share"] = row["zigzag_kept_bytes"] / row["whole_kept_bytes"]
        table.append(row)
        print(
            f"{length:6} tokens: whole {row['whole_s']:.3f} s, ring {row['zigzag_s']:.3f} s "
            f"({row['speed_up']:.2f}x), contiguous {row['contiguous_s']:.3f} s; "
            f"keeps {row['kept_share']:.2f} of the bytes, sends {row['zigzag_sent_bytes'] / 2**20:.1f} MiB a worker"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "context.json").write_text(json.dumps({"load": load, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
