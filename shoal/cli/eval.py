"""``shoal eval``: the task's own figures of a run or a checkpoint, on held-out data."""

from argparse import ArgumentParser, Namespace
from typing import Any

from shoal.cli.exit_codes import DONE
from shoal.cli.output import json_line, table
from shoal.cli.progress import display

HELP = "the task's own figures of a run or a checkpoint, on held-out data"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="a run ('latest': the newest) or one of its checkpoints")
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), help="test if there is one, else validation"
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, the last line of stdout")


def run(args: Namespace) -> int:
    from shoal.train import api

    chosen: dict[str, Any] = {"split": args.split} if args.split else {}
    with display(args.json) as show:
        result = api.evaluate(args.target, progress=show, **chosen)
    if args.json:
        print(json_line(result))
        return DONE
    figures = result.get("figures", {})
    facts = [(key, value) for key, value in result.items() if key != "figures"]
    rows = [*facts, *((name, f"{value:.6g}") for name, value in figures.items())]
    print(table(("figure", "value"), rows))
    return DONE
