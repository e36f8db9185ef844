"""``shoal chaos``: train a recipe with and without faults, and compare."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from shoal.cli.exit_codes import DONE, FAILED
from shoal.cli.output import json_line, table
from shoal.cli.parser import folder
from shoal.cli.progress import display
from shoal.cli.recipe_arguments import Chosen, add_plan_arguments, add_recipe_arguments, choose
from shoal.errors import UserError

HELP = "rehearse faults on a recipe: workers, memory, clocks, disks, checkpoints; same bits?"


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_plan_arguments(parser)
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:rank=R,step=S,phase=P",
        help="this fault instead of the usual ones; of hosts KIND:host=H,step=S",
    )
    parser.add_argument(
        "--kinds",
        default="",
        metavar="K,...",
        help="kill, stop, thaw, flip, nan, skew, fill, tear, rot (all); of hosts kill-host, stop-host, cut, cut-out, "
        "cut-in, delay, loss",
    )
    parser.add_argument(
        "--phases", default="", metavar="P,...", help="loading, forward, backward, bucket, ... (where each tells most)"
    )
    parser.add_argument(
        "--emulate-hosts", type=int, metavar="N", help="play so many hosts, and lose, stop and cut off whole ones"
    )
    parser.add_argument(
        "--network", choices=("relay", "namespaces"), help="of these hosts: a relay (default), or real links, as root"
    )
    parser.add_argument("--min-workers", type=int, default=1, metavar="M", help="wait below so many workers (1)")
    parser.add_argument("--run-dir", type=folder, metavar="DIR", help="keep both runs in this folder")


def run(args: Namespace) -> int:
    if args.network and args.emulate_hosts is None:
        raise UserError("--network is between hosts: add --emulate-hosts 3.")
    chosen = choose(args, elastic=True)
    found = (_rehearsed if args.emulate_hosts is None else _rehearsed_on_hosts)(args, chosen)
    if args.json:
        print(json_line({**found, "faults": [asdict(fault) for fault in found["faults"]]}))
    else:
        print(summary(found))
    return DONE if found["ok"] else FAILED


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def _rehearsed(args: Namespace, chosen: Chosen) -> dict[str, Any]:
    from shoal.elastic.chaos import rehearse, usual_faults
    from shoal.elastic.faults import KINDS, Fault

    usual = usual_faults(chosen.plan.workers, _names(args.kinds) or KINDS, _names(args.phases))
    faults = [Fault.parse(text) for text in args.fault] or usual
    with display(args.json) as show:
        return rehearse(chosen.recipe, chosen.plan, faults, least=args.min_workers, folder=args.run_dir, progress=show)


def _rehearsed_on_hosts(args: Namespace, chosen: Chosen) -> dict[str, Any]:
    from shoal.elastic.chaos_hosts import rehearse_hosts
    from shoal.elastic.host_faults import HOST_KINDS, HostFault, usual_host_faults

    if args.phases:
        raise UserError("--phases are of workers: leave it out with --emulate-hosts, whose faults come between steps.")
    hosts = args.emulate_hosts
    faults = [HostFault.parse(text) for text in args.fault]
    how: dict[str, Any] = {"least": args.min_workers, "folder": args.run_dir, "steps": args.steps or 0}
    with display(args.json) as show:
        return rehearse_hosts(
            chosen.recipe,
            chosen.plan,
            faults or usual_host_faults(hosts, _names(args.kinds) or HOST_KINDS),
            hosts=hosts,
            network=args.network or "relay",
            progress=show,
            **how,
        )


def summary(found: Mapping[str, Any]) -> str:
    rows: Sequence[tuple[str, ...]] = [
        (s.fault, _seconds(s.noticed_s), _seconds(s.recovered_s), "-" if s.redone is None else str(s.redone))
        if s.happened
        else (s.fault, s.why, "", "")
        for s in found["faults"]
    ]
    equal = "equal to those of the undisturbed run" if found["bits_equal"] else "NOT those of the undisturbed run"
    where = f" of {found['hosts']} hosts" if "hosts" in found else ""
    once = "each committed once" if found["told_once"] else "NOT each committed once"
    lines = [
        "",
        table(("fault", "noticed after", "next step after", "steps redone"), rows),
        "",
        f"{found['steps']} steps on {found['workers']} workers{where}, {once}; goodput {found['goodput']:.0%}",
        f"weights {equal}",
    ]
    if not found["bits_equal"]:
        lines += found["notes"]
        lines.append("shoal prove RECIPE names the first tensor that differs between numbers of workers")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
