"""``shoal resize``: another number of workers, or of parameter servers, for a run that trains."""

from argparse import ArgumentParser, Namespace

from shoal.cli.exit_codes import DONE
from shoal.cli.output import json_line

HELP = "train a running run on more or fewer workers or servers, from its next step on; same bits"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory ('latest': the newest)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workers", type=int, metavar="N", help="how many it is to have")
    which.add_argument("--servers", type=int, metavar="N", help="or how many parameter servers")
    parser.add_argument("--wait", type=float, default=120.0, metavar="S", help="seconds to wait until it is so (120)")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")


def run(args: Namespace) -> int:
    from shoal.elastic.commands import resize

    done = resize(args.run, args.workers, servers=args.servers, wait_s=args.wait)
    what = "servers" if args.servers is not None else "workers"
    if args.json:
        print(json_line(done))
    elif done["step"] is None:
        print(f"{done[what]} {what}: {done['why']}")
    else:
        print(
            f"{done['before']} -> {done[what]} {what} from step {done['step']} on, "
            f"{done['pause_s']:.2f} s between two steps"
        )
    return DONE
