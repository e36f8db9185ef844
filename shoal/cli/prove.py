"""``shoal prove``: run one recipe under several plans and compare every bit."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from shoal.cli.exit_codes import DONE, FAILED
from shoal.cli.output import json_line, table
from shoal.cli.progress import display
from shoal.cli.recipe_arguments import add_recipe_arguments, choose, whole_numbers
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe

HELP = "run a recipe under many plans, compare to the bit, name the first tensor that differs"
STEPS = 20  # where --steps is not given: enough for a wrong sum to spread to every parameter
DEFAULT = (1, 2, 4)
PLANS = {"standard": (1, 2, 3, 4, 5, 8)}  # even, uneven and one shard each, as far as the recipe's shards go


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe_arguments(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--workers", metavar="1,2,4", help="worker counts to compare with a plain loop; 1,2,4 if unset")
    group.add_argument(
        "--plans", choices=sorted(PLANS), help="standard: 1, 2, 3, 4, 5 and 8 workers, where the shards allow"
    )


def run(args: Namespace) -> int:
    recipe = choose(args).recipe
    workers = worker_counts(args, recipe)
    from shoal.prove import api

    with display(args.json) as show:
        result = api.prove(recipe, workers=workers, steps=args.steps or STEPS, progress=show)
    plans = result["plans"]
    if args.json:
        print(json_line(result))
    else:
        print(table(("plan", "result", "error", "first difference"), map(_row, plans)))
    return DONE if all(plan["ok"] for plan in plans) else FAILED


def worker_counts(args: Namespace, recipe: Recipe) -> tuple[int, ...]:
    """The counts to compare. Raises UserError when one of those asked for cannot run the recipe."""
    if args.workers is None:
        asked = PLANS[args.plans] if args.plans else DEFAULT
        return tuple(count for count in asked if count <= recipe.shards)
    counts = whole_numbers("--workers", args.workers)
    for count in counts:
        Plan(mesh={"data": count}).owned(recipe.shards)
    return counts


def _row(plan: Mapping[str, Any]) -> tuple[object, ...]:
    same = f"within {plan['tolerance']:g}" if plan.get("tolerance") else "same"
    same = "lossy" if plan.get("lossy") else same
    differs = plan["differs"]
    places = [f"step {differs['step']}, {differs['tensor']}"] if differs else []
    for name in ("ranks", "shards"):
        if plan.get(name):
            places.append(f"{name} {' '.join(map(str, plan[name]))}")
    where = "; ".join([*places, *filter(None, [plan.get("failure")])])
    return plan["plan"], same if plan["ok"] else "DIFFERS", f"{plan['error']:.3g}", where
