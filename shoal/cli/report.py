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
    from shoal.observe import communication_facts, pipeline_section, report, trace

    runs = [Run.find(target) for target in (*args.run, *args.compare)]
    told = communication_facts.of_runs(runs)
    stages = [pipeline_section.of_run(run) for run in runs]
    page = report.write(runs, args.output)
    traced = trace.write(runs[0], args.trace) if args.trace else None
    if args.json:
        facts = [communication_facts.facts(c) if c else None for c in told]
        result = {"report": page, "runs": [run.path for run in runs], "communication": facts}
        result["pipeline"] = [pipeline_section.facts(each) if each else None for each in stages]
        print(json_line({**result, "trace": traced} if traced else result))
        return DONE
    for run, c, staged in zip(runs, told, stages, strict=True):
        for line in (*(pipeline_section.lines(staged) if staged else []), *(communication_facts.lines(c) if c else [])):
            print(f"{run.path.name}: {line}" if len(runs) > 1 else line)
    for line in pipeline_section.against_off([(run.path.name, each) for run, each in zip(runs, stages, strict=True)]):
        print(line)
    print(f"wrote {page}" + (f" and {traced}" if traced else ""))
    return DONE
