"""``shoal resize``: another number of workers for a run that trains."""

from argparse import ArgumentParser, Namespace

from shoal.cli.exit_codes import DONE
from shoal.cli.output import json_line

HELP = "train a running run on more or fewer workers, from its next step on; same bits"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory ('latest': the newest)")
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="how many it is to have")
    parser.add_argument("--wait", type=float, default=120.0, metavar="S", help="seconds to wait until it is so (120)")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")


def run(args: Namespace) -> int:
    from shoal.elastic.commands import resize

    done = resize(args.run, args.workers, wait_s=args.wait)
    if args.json:
        print(json_line(done))
    elif done["step"] is None:
        print(f"{done['workers']} workers: {done['why']}")
    else:
        print(
            f"{done['before']} -> {done['workers']} workers from step {done['step']} on, "
            f"{done['pause_s']:.2f} s between two steps"
        )
    return DONE
