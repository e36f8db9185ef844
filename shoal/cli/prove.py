"""``shoal prove``: run a recipe, or the standard list, under many plans and compare every bit."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.cli.exit_codes import DONE, FAILED
from shoal.cli.output import json_line, table
from shoal.cli.progress import display
from shoal.cli.recipe_arguments import RECIPE_FLAGS, add_recipe_arguments, choose, whole_numbers
from shoal.errors import UserError
from shoal.prove.place import place_of
from shoal.prove.plans import FAMILIES
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe

HELP = "run a recipe under many plans, compare to the bit, name the first tensor that differs"
STEPS = 20  # where --steps is not given: enough for a wrong sum to spread to every parameter
DEFAULT = (1, 2, 4)


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe_arguments(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--workers", metavar="1,2,4", help="worker counts to compare with a plain loop; 1,2,4 if unset")
    group.add_argument(
        "--plans",
        metavar="NAMES",
        help=f"{', '.join(FAMILIES)}, or plan files (PLAN.toml), with commas between; without RECIPE on tiny models of "
        f"every kind, with one on it, as far as it can be split so",
    )
    parser.add_argument("--models", metavar="gpt,moe", help="of --plans without RECIPE: these kinds of models alone")


def run(args: Namespace) -> int:
    result = _prove(args)
    plans = result["plans"]
    if args.json:
        print(json_line(result))
    else:
        named = any("model" in plan for plan in plans)
        header = ("plan", "result", "error", "first difference")
        print(table(("model", *header) if named else header, [_row(plan, named) for plan in plans]))
        for plan, why in result.get("left_out", ()):
            print(f"not for this model: {plan}: {why}")
    return DONE if all(plan["ok"] for plan in plans) else FAILED


def _prove(args: Namespace) -> dict[str, Any]:
    names = [name.strip() for name in args.plans.split(",")] if args.plans else []
    files = [name for name in names if name.endswith(".toml")]
    if files and len(files) < len(names):
        raise UserError(f"--plans {args.plans}: give plan files or names of the standard list, not both.")
    if names and not files and args.recipe is None:
        return _standard(args, names)
    if args.models:
        raise UserError("--models chooses from the standard list: give --plans standard, and no RECIPE.")
    recipe = choose(args).recipe
    from shoal.prove import api

    steps = args.steps or STEPS
    if not names:
        workers = worker_counts(args, recipe)
        with display(args.json) as show:
            return api.prove(recipe, workers=workers, steps=steps, progress=show)
    left_out: list[tuple[str, str]] = []
    plans = [Plan.from_toml(Path(file)) for file in files]
    if not files:
        plans, left_out = api.fitting(recipe, names)
    with display(args.json) as show:
        return {**api.prove(recipe, plans=plans, steps=steps, progress=show), "left_out": left_out}


def _standard(args: Namespace, names: list[str]) -> dict[str, Any]:
    given = [flag for flag in RECIPE_FLAGS if flag != "--steps" and getattr(args, flag[2:]) is not None]
    given += ["--set"] if args.set else []
    if given:
        raise UserError(f"the standard list has its own recipes: leave {given[0]} out, or name the RECIPE to prove.")
    models = [name.strip() for name in args.models.split(",")] if args.models else []
    from shoal.prove import api

    with display(args.json) as show:
        return api.prove_standard(models=models, families=names, steps=args.steps or STEPS, progress=show)


def worker_counts(args: Namespace, recipe: Recipe) -> tuple[int, ...]:
    """The counts to compare. Raises UserError when one of those asked for cannot run the recipe."""
    if args.workers is None:
        return tuple(count for count in DEFAULT if count <= recipe.shards)
    counts = whole_numbers("--workers", args.workers)
    for count in counts:
        Plan(mesh={"data": count}).owned(recipe.shards)
    return counts


def _row(plan: Mapping[str, Any], named: bool) -> tuple[object, ...]:
    same = f"within {plan['tolerance']:g}" if plan.get("tolerance") else "same"
    same = "lossy" if plan.get("lossy") else same
    row = (plan["plan"], same if plan["ok"] else "DIFFERS", f"{plan['error']:.3g}", place_of(plan))
    return (plan["model"], *row) if named else row
