"""The options that choose a recipe and a plan, shared by every verb that runs one."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.cluster.detect import launched_workers, usable_cores
from shoal.errors import UserError, unknown_name
from shoal.recipe import presets
from shoal.recipe.layers import Layer, Origins, assemble, assemble_plan, owner, parse_setting, saved_layer
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.recipe.typed import to_mapping
from shoal.run.batches import recorded
from shoal.run.run import Run, origin
from shoal.train.states_choice import CHOSEN, settled_states

DEFAULT_PRESET = "gpt-stdlib"
FOUND_OUT = ("default", "detected", "torchrun")  # plan values that a resumed run finds out again

RECIPE_FLAGS = {  # flag -> (dotted key, type, help)
    "--steps": ("steps", int, "length in steps"),
    "--epochs": ("epochs", int, "length in epochs"),
    "--batch": ("batch", int, "samples a step, over all shards"),
    "--shards": ("shards", int, "leaves of the reduction tree: the most workers the run can ever use"),
    "--seed": ("seed", int, "seed of weights, order and dropout"),
    "--precision": ("precision", str, "auto, float32 or bfloat16"),
    "--lr": ("optimizer.lr", float, "learning rate"),
}
SYNC_FLAGS = {  # flag -> (dotted key of the plan, type, help)
    "--sync": ("sync", str, "exact, fast, parameter-server or local: how workers agree on the weights"),
    "--servers": ("servers", int, "parameter-server: processes that hold the parameters"),
    "--staleness": ("staleness", int, "parameter-server: steps ahead of the slowest worker; 0 exact, -1 any"),
    "--average-every": ("average_every", int, "local: steps between two averages of the weights"),
    "--compression": ("compression", str, "of gradients, lossy: none, fp16, bf16, int8, topk, 1bit or powersgd"),
}
METAVARS: Mapping[type, str] = {int: "N", float: "X", str: "NAME"}


@dataclass(frozen=True)
class Chosen:
    recipe: Recipe
    plan: Plan
    origins: Origins  # of the recipe's and the plan's values; their dotted keys do not overlap


def add_recipe_arguments(parser: ArgumentParser) -> None:
    known = ", ".join(presets.names())
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=f"a TOML file, or a preset: {known}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any dotted key, such as model.layers=6"
    )
    for flag, (_, kind, text) in RECIPE_FLAGS.items():
        parser.add_argument(flag, type=kind, metavar=METAVARS[kind], help=text)
    parser.add_argument(
        "--batch-policy",
        metavar="P",
        help="fixed, goodput[:MAX] (it follows workers and gradient noise: other weights), replay:RUN (as RUN did)",
    )
    parser.add_argument("--json", action="store_true", help="progress as JSON lines on stderr, the result on stdout")


def add_plan_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes; they never change the result")
    parser.add_argument("--plan", type=Path, metavar="PLAN.toml", help="where the work runs, from a file")
    parser.add_argument("--mesh", metavar="data=N", help="workers along each axis of the mesh")
    parser.add_argument("--placement", metavar="5,3", help="shards of each worker")
    parser.add_argument("--fast", action="store_true", help="short for --sync fast: within tolerance, not to the bit")
    for flag, (_, kind, help) in SYNC_FLAGS.items():
        parser.add_argument(flag, type=kind, metavar=METAVARS[kind], help=help)
    parser.add_argument("--device", metavar="D", help="auto, cpu or cuda")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard files too")


def choose(args: Namespace, environment: Mapping[str, str] = os.environ, *, elastic: bool = False) -> Chosen:
    """The recipe and the plan that the arguments mean. Raises UserError naming the argument, the file or the key.

    ``elastic``: workers of the run may come and go."""
    of_recipe, of_plan, spelt = _flags(args)
    resumed = Run.find(args.resume) if getattr(args, "resume", None) else None
    if getattr(args, "start", None) and not args.recipe and not resumed:
        resumed = origin(args.start)[0]  # another recipe may be named, as long as it goes on with the same arithmetic
    if resumed and args.recipe:
        raise UserError(f"--resume goes on with the recipe of {args.resume!r}: leave {args.recipe!r} out.")
    file, preset = (None, None) if resumed else _file_or_preset(args.recipe)
    recipe, origins = assemble(
        file, preset, of_recipe, spelt=spelt, saved=saved_layer(resumed.recipe, resumed.origins) if resumed else None
    )
    if not recipe.data.path:
        raise UserError(f"the recipe ({preset or file}) needs your data: --set data.path=PATH")
    joined = launched_workers(environment)
    plan, plan_origins = assemble_plan(
        getattr(args, "plan", None),
        of_plan,
        shards=recipe.shards,
        cores=usable_cores(),
        world_size=joined,
        spelt=spelt,
        saved=_decided(resumed) if resumed else None,
    )
    plan, told = settled_states(plan, recipe, elastic=elastic, joined=joined is not None)
    return Chosen(recipe, plan, origins | plan_origins | told)


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints: of those that torchrun started, the first one does."""
    return launched_workers(environment) is None or environment["RANK"] == "0"


def _file_or_preset(name: str | None) -> tuple[Path | None, str | None]:
    if name is None:
        return None, DEFAULT_PRESET
    if name in presets.names():
        return None, name
    if name.endswith(".toml") or os.sep in name or Path(name).is_file():
        return Path(name), None
    raise unknown_name("recipe (no such file or preset)", name, presets.names())


def _decided(run: Run) -> Layer:
    """The run's plan, but for what was only found out about the machine that it ran on."""
    saved = saved_layer(run.plan, run.origins)
    kept = {key: value for key, value in saved.values.items() if not _found_out(saved.origin_of(key))}
    return Layer(kept, saved.origin, saved.origins)


def _found_out(origin: str) -> bool:
    return origin in FOUND_OUT or origin.startswith(CHOSEN)


def _flags(args: Namespace) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """(the recipe's values, the plan's values, dotted key -> the flag as written)."""
    values = dict(parse_setting(text) for text in args.set)
    spelt: dict[str, str] = {}
    for flag, key, value in _named(args):
        values[key], spelt[key] = value, flag
    of_recipe = {key: value for key, value in values.items() if owner(key, "--set") is Recipe}
    of_plan = {key: value for key, value in values.items() if key not in of_recipe}
    return of_recipe, of_plan, spelt


def _named(args: Namespace) -> list[tuple[str, str, Any]]:
    """(flag, dotted key, value) of the options that have a name of their own."""
    given = [(flag, key, getattr(args, flag[2:])) for flag, (key, _, _) in RECIPE_FLAGS.items()]
    if getattr(args, "batch_policy", None) is not None:
        said = batch_policy(args.batch_policy)
        given += [("--batch-policy", f"batching.{key}", value) for key, value in said.items()]
    if hasattr(args, "mesh"):
        given += [
            ("--workers", "mesh.data", args.workers),
            *(("--mesh", f"mesh.{axis}", size) for axis, size in mesh_sizes(args.mesh)),
            (
                "--placement",
                "placement",
                whole_numbers("--placement", args.placement) if args.placement is not None else None,
            ),
            ("--fast", "sync", "fast" if args.fast else None),
            ("--device", "device", args.device),
            ("--tensorboard", "report.tensorboard", True if args.tensorboard else None),
            *((f, key, getattr(args, f[2:].replace("-", "_"))) for f, (key, _, _) in SYNC_FLAGS.items()),
        ]
        if args.fast and args.sync is not None:
            raise UserError("give --fast or --sync, not both: --fast means --sync fast.")
        if args.workers is not None and args.mesh is not None:
            raise UserError("give --workers or --mesh, not both: --workers N means --mesh data=N.")
    return [(flag, key, value) for flag, key, value in given if value is not None]


def batch_policy(text: str) -> dict[str, Any]:
    """ "goodput:512" -> the recipe's keys of the table batching. Raises UserError."""
    name, colon, rest = text.partition(":")
    if name == "replay" and rest:
        return dict(to_mapping(recorded(Run.find(rest))))
    if name == "goodput" and (not colon or (rest.isdecimal() and int(rest))):
        return {"policy": "goodput", "most": int(rest or 0), "changes": []}
    if text == "fixed":
        return {"policy": "fixed", "most": 0, "changes": []}
    raise UserError(f"--batch-policy {text!r}: use fixed, goodput, goodput:MAX (samples, 512 say) or replay:RUN.")


def mesh_sizes(text: str | None) -> list[tuple[str, int]]:
    """ "data=2,pipe=2" -> [("data", 2), ("pipe", 2)]. Raises UserError."""
    sizes: list[tuple[str, int]] = []
    for part in text.split(",") if text is not None else ():
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not size.isdecimal():
            raise UserError(f"--mesh {text!r}: write it as axis=workers, such as --mesh data=2.")
        if axis in dict(sizes):
            raise UserError(f"--mesh {text!r} gives axis {axis!r} twice: leave one out.")
        sizes.append((axis, int(size)))
    return sizes


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """ "5,3" -> (5, 3). Raises UserError naming the flag."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{flag} {text!r}: write whole numbers with commas between, such as {flag} 5,3.")
    return tuple(map(int, parts))
