"""``shoal bench``: how fast collectives are here, or how much a server carries."""

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from shoal.cli import bench_collectives, bench_serve
from shoal.errors import UserError, unknown_name

HELP = "speed of collectives, or what a server carries under load"
SUBJECTS: dict[str, ModuleType] = {"collectives": bench_collectives, "serve": bench_serve}
_own: dict[str, dict[str, str]] = {}  # subject -> the name of each option that only it has -> how it is written


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="|".join(SUBJECTS), help="what to measure")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="of serve: the URL of a server, or what to serve")
    for subject, module in SUBJECTS.items():
        group = parser.add_argument_group(subject, module.HELP)
        module.add_arguments(partial(_add, group.add_argument, _own.setdefault(subject, {})))
    parser.add_argument("--seconds", type=float, metavar="X", help="collectives: for the whole sweep, about; 45. "
                        "serve: of each load; 5")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as .html or .svg (serve: .svg)")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, the last line of stdout")


def _add(add_argument: Callable[..., Action], own: dict[str, str], written: str, **settings: Any) -> Action:
    action = add_argument(written, **settings)
    own[action.dest] = written
    return action


def run(args: Namespace) -> int:
    """0: measured. 1: what was measured was wrong, or nothing was answered."""
    if args.subject not in SUBJECTS:
        raise unknown_name("subject", args.subject, SUBJECTS, "`shoal bench`")
    for subject, options in _own.items():
        for name, written in options.items():
            if subject != args.subject and getattr(args, name) is not None:
                raise UserError(f"{written} is for `shoal bench {subject}`, not for {args.subject}.")
    module = SUBJECTS[args.subject]
    if args.plot and args.plot.suffix not in module.PLOTS:
        raise UserError(f"--plot {str(args.plot)!r}: name a file that ends in {' or '.join(module.PLOTS)}.")
    return int(module.run(args))
