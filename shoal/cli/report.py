"""``shoal report``: one self-contained HTML page about a run, or about several side by side."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from shoal.cli.exit_codes import DONE
from shoal.cli.output import json_line
from shoal.run.run import Run

HELP = "one HTML page about a run, or several runs laid over each other"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory ('latest': the newest)")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="runs to lay over it")
    parser.add_argument("--output", type=Path, metavar="FILE", help="report.html inside RUN if unset")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")


def run(args: Namespace) -> int:
    from shoal.observe import report

    runs = [Run.find(target) for target in (args.run, *args.compare)]
    page = report.write(runs, args.output)
    print(json_line({"report": page, "runs": [run.path for run in runs]}) if args.json else f"wrote {page}")
    return DONE
