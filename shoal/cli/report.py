"""``shoal report``: one self-contained HTML page about a run, or about several side by side."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from shoal.cli.exit_codes import DONE
from shoal.cli.output import json_line
from shoal.run.run import Run

HELP = "one HTML page about a run, or several runs laid over each other"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", metavar="RUN", help="run directories ('latest': the newest)")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="more runs to lay over the first")
    parser.add_argument("--output", type=Path, metavar="FILE", help="report.html inside RUN if unset")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also its sampled steps, for Perfetto")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")


def run(args: Namespace) -> int:
    from shoal.observe import communication_facts, report, trace

    runs = [Run.find(target) for target in (*args.run, *args.compare)]
    told = communication_facts.of_runs(runs)
    page = report.write(runs, args.output)
    traced = trace.write(runs[0], args.trace) if args.trace else None
    if args.json:
        facts = [communication_facts.facts(c) if c else None for c in told]
        result = {"report": page, "runs": [run.path for run in runs], "communication": facts}
        print(json_line({**result, "trace": traced} if traced else result))
        return DONE
    for run, c in zip(runs, told, strict=True):
        for line in communication_facts.lines(c) if c else []:
            print(f"{run.path.name}: {line}" if len(runs) > 1 else line)
    print(f"wrote {page}" + (f" and {traced}" if traced else ""))
    return DONE
