"""``shoal drain``: end a run, or let one of its workers leave, without losing a step."""

from argparse import ArgumentParser, Namespace

from shoal.cli.exit_codes import DONE
from shoal.cli.output import json_line
from shoal.errors import UserError

HELP = "end a running run after the step in flight, saved; or one worker or host of it"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory ('latest': the newest)")
    parser.add_argument("--rank", type=int, metavar="R", help="only this worker, as in the run's workers.json")
    parser.add_argument("--host", default="", metavar="NAME", help="only the workers of this host, of a run on several")
    parser.add_argument("--grace", type=float, default=0.0, metavar="S", help="say whether so many seconds will do")
    parser.add_argument("--wait", type=float, default=300.0, metavar="S", help="seconds to wait until it is done (300)")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")


def run(args: Namespace) -> int:
    from shoal.elastic.commands import drain

    if args.host and args.rank is not None:
        raise UserError("--rank names one worker and --host all of a host: give one of them.")
    only = {"host": args.host} if args.host else {}
    done = drain(args.run, rank=args.rank, **only, grace_s=args.grace, wait_s=args.wait)
    if args.json:
        print(json_line(done))
        return DONE
    who = "the run has ended, saved"
    if args.host or args.rank is not None:
        who = f"{args.host or f'rank {args.rank}'} has left"
    print(f"{who}, after step {done['step']}, in {done['seconds']:.2f} s; no step was lost")
    if args.grace:
        will = "will do" if done["grace_will_do"] else "is short: a kill would cost the step in flight"
        print(f"a grace of {args.grace:g} s {will} (expected: {done['needed_s']:.2f} s)")
    return DONE
