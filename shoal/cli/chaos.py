"""``shoal chaos``: train a recipe with and without faults, and compare."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.cli.exit_codes import DONE, FAILED
from shoal.cli.output import json_line, table
from shoal.cli.progress import display
from shoal.cli.recipe_arguments import add_plan_arguments, add_recipe_arguments, choose

HELP = "rehearse faults on a recipe: workers, memory, clocks, disks, checkpoints; same bits?"


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_plan_arguments(parser)
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:rank=R,step=S,phase=P",
        help="this fault instead of the usual ones",
    )
    parser.add_argument(
        "--kinds", default="", metavar="K,...", help="kill, stop, thaw, flip, nan, skew, fill, tear, rot (all)"
    )
    parser.add_argument(
        "--phases", default="", metavar="P,...", help="loading, forward, backward, bucket, ... (where each tells most)"
    )
    parser.add_argument("--min-workers", type=int, default=1, metavar="M", help="wait below so many workers (1)")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="keep both runs in this folder")


def run(args: Namespace) -> int:
    from shoal.elastic.chaos import rehearse, usual_faults
    from shoal.elastic.faults import KINDS, Fault

    chosen = choose(args, elastic=True)
    kinds = [name.strip() for name in args.kinds.split(",")] if args.kinds else KINDS
    phases = [name.strip() for name in args.phases.split(",")] if args.phases else []
    faults = [Fault.parse(text) for text in args.fault] or usual_faults(chosen.plan.workers, kinds, phases)
    with display(args.json) as show:
        found = rehearse(chosen.recipe, chosen.plan, faults, least=args.min_workers, folder=args.run_dir, progress=show)
    if args.json:
        print(json_line({**found, "faults": [asdict(fault) for fault in found["faults"]]}))
    else:
        print(summary(found))
    return DONE if found["ok"] else FAILED


def summary(found: Mapping[str, Any]) -> str:
    rows: Sequence[tuple[str, ...]] = [
        (s.fault, _seconds(s.noticed_s), _seconds(s.recovered_s), "-" if s.redone is None else str(s.redone))
        if s.happened
        else (s.fault, s.why, "", "")
        for s in found["faults"]
    ]
    equal = "equal to those of the undisturbed run" if found["bits_equal"] else "NOT those of the undisturbed run"
    once = "each committed once" if found["told_once"] else "NOT each committed once"
    lines = [
        "",
        table(("fault", "noticed after", "next step after", "steps redone"), rows),
        "",
        f"{found['steps']} steps on {found['workers']} workers, {once}; goodput {found['goodput']:.0%}",
        f"weights {equal}",
    ]
    if not found["bits_equal"]:
        lines += found["notes"]
        lines.append("shoal prove RECIPE names the first tensor that differs between numbers of workers")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
