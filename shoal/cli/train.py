"""``shoal train``: train a model, or go on with a run."""

import re
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.cli.exit_codes import DONE, INTERRUPTED
from shoal.cli.output import count, duration, figures, json_line, table
from shoal.cli.parser import folder
from shoal.cli.progress import display
from shoal.cli.recipe_arguments import Chosen, add_plan_arguments, add_recipe_arguments, choose, speaks
from shoal.errors import UserError
from shoal.recipe.typed import flatten, to_mapping

if TYPE_CHECKING:
    from shoal.train.notices import Notice

HELP = "train a model; without arguments, a small GPT on Python's own sources"


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_plan_arguments(parser)
    parser.add_argument(
        "--run-dir", type=folder, metavar="DIR", help="where the run is kept; runs/<model>-<time> if unset"
    )
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with a run ('latest': the newest), on any number of workers"
    )
    parser.add_argument("--from", dest="start", metavar="RUN@STEP", help="a new run, from a checkpoint of another one")
    parser.add_argument(
        "--elastic", action="store_true", help="go on with the same bits when workers are lost or added"
    )
    parser.add_argument(
        "--min-workers", type=int, metavar="M", help="with --elastic: wait, state in memory, below so many (1)"
    )
    parser.add_argument(
        "--agents", metavar="HOST:PORT,...", help="with --elastic on several hosts: the address of each one's agent"
    )
    parser.add_argument("--agent", type=int, metavar="I", help="which of the --agents this host is, from 0")
    parser.add_argument(
        "--emulate-hosts", type=int, metavar="N", help="with --elastic: as on so many hosts, all played by this one"
    )
    parser.add_argument("--rebalance", action="store_true", help="with --elastic: move shards away from slow workers")
    parser.add_argument(
        "--autoscale",
        metavar="MIN:MAX",
        help="with --elastic: as many workers as make steps faster, within these bounds",
    )
    parser.add_argument(
        "--notice", default="", metavar="FILE|URL", help="end, saved, once this file is there or this address answers"
    )
    parser.add_argument(
        "--grace", type=float, default=0.0, metavar="S", help="from a signal or notice to the kill: says if S s will do"
    )
    parser.add_argument("--explain", action="store_true", help="show every value and where it came from, and stop")


def run(args: Namespace) -> int:
    chosen = choose(args, elastic=args.elastic)
    if args.explain:
        rows = explained(chosen)
        print(json_line([row._asdict() for row in rows]) if args.json else table(Explained._fields, map(_shown, rows)))
        return DONE
    if (args.min_workers is not None or args.rebalance) and not args.elastic:
        flag = "--min-workers" if args.min_workers is not None else "--rebalance"
        raise UserError(f"{flag} is for runs whose workers may change: add --elastic.")
    _check_hosts(args)
    _bounds(args)
    sampled: list[str] = []
    with display(args.json, speaks()) as show:

        def progress(event: Mapping[str, Any]) -> None:
            show(event)
            if event["event"] == "sampled":
                sampled[:] = [event["text"]]

        result = _trainer(args)(
            chosen.recipe,
            chosen.plan,
            origins=chosen.origins,
            run_dir=args.run_dir,
            resume=args.resume,
            **({"start": args.start} if args.start else {}),
            **({"notice": _notice(args)} if args.notice or args.grace else {}),
            progress=progress,
        )
    if speaks():
        print(json_line(result) if args.json else summary(result, *sampled))
    return INTERRUPTED if result["interrupted"] else DONE


def _check_hosts(args: Namespace) -> None:
    flags = {"--agents": args.agents, "--agent": args.agent, "--emulate-hosts": args.emulate_hosts}
    named = [flag for flag, value in flags.items() if value is not None]
    if named and not args.elastic:
        raise UserError(f"{named[0]} is for runs whose hosts may change: add --elastic.")
    if named and args.rebalance:
        raise UserError("--rebalance moves shards between workers of one host: leave it out on several.")
    if "--emulate-hosts" in named and len(named) > 1:
        raise UserError(f"--emulate-hosts plays all hosts here: leave {named[0]} out.")
    if (args.agents is None) != (args.agent is None):
        raise UserError("--agents names all hosts and --agent says which of them this one is: give both.")


def _trainer(args: Namespace) -> Callable[..., dict[str, Any]]:
    if args.elastic and (args.agents is not None or args.emulate_hosts is not None):
        from shoal.elastic.emulated import train_emulated
        from shoal.elastic.hosts import train_on_hosts

        least = 1 if args.min_workers is None else args.min_workers
        if args.emulate_hosts is not None:
            return partial(train_emulated, hosts=args.emulate_hosts, least=least)
        return partial(train_on_hosts, agents=args.agents.split(","), number=args.agent, least=least)
    if args.elastic:
        from shoal.elastic.api import train_elastic

        least = 1 if args.min_workers is None else args.min_workers
        return partial(train_elastic, least=least, rebalance=args.rebalance, autoscale=_bounds(args))
    from shoal.train import api

    return api.train


def _bounds(args: Namespace) -> tuple[int, int] | None:
    if args.autoscale is None:
        return None
    if not args.elastic:
        raise UserError("--autoscale is for runs whose workers may change: add --elastic.")
    if args.agents is not None or args.emulate_hosts is not None:
        raise UserError("--autoscale counts workers of one host: leave it out on several, and use shoal resize.")
    found = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", args.autoscale)
    if found is None:
        raise UserError(f"--autoscale {args.autoscale}: use two numbers of workers, MIN:MAX, 1:4 say.")
    return int(found[1]), int(found[2])


def _notice(args: Namespace) -> "Notice":
    from shoal.train.notices import Notice

    if args.emulate_hosts is not None:
        raise UserError("--notice and --grace are of one host: leave them out where this machine plays several.")
    return Notice(args.notice, args.grace)


class Explained(NamedTuple):
    key: str
    value: Any
    origin: str


def explained(chosen: Chosen) -> list[Explained]:
    """Every effective value of the recipe and of the plan, and where it came from."""
    values = flatten(to_mapping(chosen.recipe)) | flatten(to_mapping(chosen.plan))
    return [Explained(key, value, chosen.origins[key]) for key, value in values.items()]


def _shown(row: Explained) -> tuple[str, str, str]:
    value = row.value if isinstance(row.value, str) and row.value else json_line(row.value)
    return row.key, value, row.origin


def summary(result: Mapping[str, Any], sample: str | None = None) -> str:
    """What a person wants to know at the end: the figures, a sample, where the run is and what to type next."""
    run = _shortest(result["run_dir"])
    ended = "interrupted after" if result["interrupted"] else "trained"
    lines = [
        "",
        f"{ended} {result['steps']} {'step' if result['steps'] == 1 else 'steps'} on "
        f"{count(result['samples'])} samples in {duration(result['seconds'])}, loss {result['loss']:.4f}",
    ]
    if result["figures"]:
        lines.append(f"held out: {figures(result['figures'])}")
    if sample is not None:
        lines += ["", "a sample of the model:", *(f"  | {line}" for line in printable(sample).splitlines())]
    lines += [
        "",
        f"run         {run}",
        f"checkpoint  {_shortest(result['checkpoint']) if result['checkpoint'] else 'none'}",
        f"weights     {result['weights_sha256']}",
        "",
        "next:",
    ]
    following = {"train --resume": "go on from here"} if result["interrupted"] else {}
    following |= {
        "report": "a page with curves and where the time went",
        "eval": "the task's figures on held-out data",
        "serve": "over HTTP, with a page to try it",
        "inspect": "show and verify the checkpoints",
    }
    lines += [f"  {f'shoal {verb} {shlex.quote(run)}':<{len(run) + 24}} {why}" for verb, why in following.items()]
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text without what a terminal would obey: a young model writes any byte."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text.expandtabs())


def _shortest(path: str | Path) -> str:
    """Relative to the working directory where it lies inside it."""
    place = Path(path)
    return str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)
