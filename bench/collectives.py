"""Shoal's shared-memory collectives against gloo, in the same processes, in turns: each figure beside its goal.

    python bench/collectives.py [--rounds 3] [--seconds 200] [--quick] [--out bench/results/collectives.json]

As `shoal bench collectives` measures: a barrier before every call, the slowest rank, the median of iterations, then of
rounds; beside them a copy of the same bytes on all ranks at once. A case covers several sizes: the smallest ratio
counts. See bench/death.py for what happens when a rank dies, and for what a waiting one costs.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.cli.output import interval
from shoal.comm.measuring.cases import Settings, size_text
from shoal.comm.measuring.sweep import machine, sweep

RESULTS = Path(__file__).parent / "results" / "collectives.json"
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Goal:
    """What a case must reach over all its sizes."""

    case: str
    workers: int
    op: str
    dtype: str
    sizes: tuple[int, ...]
    zero_copy: bool
    against: float  # times gloo's speed
    memcpy: float | None = None  # share of the speed of an in-run memcpy

    def rows(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The shm rows of this case."""
        return [
            row
            for row in rows
            if (row["ranks"], row["op"], row["dtype"]) == (self.workers, self.op, self.dtype)
            and (row["transport"], row["zero_copy"]) == ("shm", self.zero_copy)
            and row["bytes"] in self.sizes
        ]


SMALL, MIDDLE, LARGE = (KIB, 8 * KIB, 64 * KIB), (MIB, 4 * MIB), (16 * MIB, 64 * MIB, 256 * MIB)
HALF = (4 * MIB, 16 * MIB, 64 * MIB)
MOVED = (16 * MIB, 64 * MIB)
GOALS = (
    Goal("all-reduce, 2 ranks, 1-64 KiB", 2, "all_reduce", "float32", SMALL, False, 2.5),
    Goal("1-4 MiB, staged", 2, "all_reduce", "float32", MIDDLE, False, 2.5),
    Goal("1-4 MiB, zero-copy", 2, "all_reduce", "float32", MIDDLE, True, 5.0),
    Goal("16-256 MiB, staged", 2, "all_reduce", "float32", LARGE, False, 3.0, 0.7),
    Goal("16-256 MiB, zero-copy", 2, "all_reduce", "float32", LARGE, True, 6.0, 1.0),
    Goal("bf16, 4-64 MiB, staged", 2, "all_reduce", "bfloat16", HALF, False, 4.5),
    Goal("4 ranks, 1-64 KiB", 4, "all_reduce", "float32", SMALL, False, 15.0),
    Goal("4 ranks, 1 MiB, staged", 4, "all_reduce", "float32", (MIB,), False, 7.0),
    Goal("4 ranks, 16-64 MiB, zero-copy", 4, "all_reduce", "float32", MOVED, True, 8.0),
    Goal("reduce-scatter, 2 ranks, 16-64 MiB", 2, "reduce_scatter", "float32", MOVED, False, 3.5),
    Goal("all-gather, 2 ranks, 16-64 MiB", 2, "all_gather", "float32", MOVED, False, 2.5),
    Goal("broadcast, 2 ranks, 16-64 MiB", 2, "broadcast", "float32", MOVED, False, 2.0),
)


def sweeps(rounds: int, seconds: float, quick: bool) -> list[Settings]:
    """The sweeps that cover all goals: what has ranks, operation and dtype in common goes together."""
    together: dict[tuple[int, str, str], set[int]] = {}
    for goal in GOALS:
        together.setdefault((goal.workers, goal.op, goal.dtype), set()).update(goal.sizes)
    cells = sum(map(len, together.values()))
    return [
        Settings(
            workers=workers,
            ops=(op,),
            dtypes=(dtype,),
            sizes=tuple(sorted(size for size in sizes if size <= 16 * MIB or not quick)),
            transports=("gloo", "shm"),
            zero_copy=True,
            rounds=rounds,
            seconds=seconds * len(sizes) / cells,
        )
        for (workers, op, dtype), sizes in together.items()
    ]


def judged(goal: Goal, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The least that the case reached over its sizes."""
    found = goal.rows(rows)
    reached = bool(found) and all(
        row["against"] >= goal.against and (goal.memcpy is None or row["memcpy_share"] >= goal.memcpy) for row in found
    )
    return {
        **asdict(goal),
        "reached": reached,
        "measured": [
            {
                key: row[key]
                for key in (
                    "bytes",
                    "against",
                    "against_best",
                    "memcpy_share",
                    "memcpy_share_best",
                    "against_cpu",
                    "latency_s",
                    "min_s",
                )
            }
            for row in found
        ],
    }


def shown(case: dict[str, Any]) -> str:
    goal = f"{case['against']:g}x" + (f", {case['memcpy']:g} of memcpy" if case["memcpy"] else "")
    lines = [f"{'reached' if case['reached'] else 'MISSED ':8} {case['case']:36} goal {goal}"]
    for row in case["measured"]:
        lines.append(
            f"    {size_text(row['bytes']):>8}  {row['against']:5.1f}x gloo, best/best {row['against_best']:5.1f}x;  "
            f"{row['memcpy_share']:5.2f} of memcpy, best/best {row['memcpy_share_best']:5.2f};  "
            f"CPU {row['against_cpu']:5.1f}x less;  {interval(row['latency_s'])}, best {interval(row['min_s'])}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--quick", action="store_true", help="no size above 16 MiB")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name has TEXT in it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    wanted = [goal for goal in GOALS if args.only in goal.case]
    ranks_and_ops = {(goal.workers, goal.op, goal.dtype) for goal in wanted}
    before = os.getloadavg()
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for settings in sweeps(args.rounds, args.seconds, args.quick):
        if (settings.workers, settings.ops[0], settings.dtypes[0]) in ranks_and_ops:
            result = sweep(settings)
            rows += result["rows"]
            wrong += result["wrong"]
    cases = [judged(goal, rows) for goal in wanted]
    print("\n".join(map(shown, cases)))
    print("\n".join(f"WRONG RESULT: {line}" for line in wrong))
    out = {
        "machine": machine(),
        "load_before": before,
        "rounds": args.rounds,
        "cases": cases,
        "rows": rows,
        "wrong": wrong,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out, indent=1) + "\n")
    print(f"load {before[0]:.2f} before, {os.getloadavg()[0]:.2f} after; raw numbers: {args.out}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
