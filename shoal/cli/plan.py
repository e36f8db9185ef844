"""``shoal plan``: what a plan is, and what its pipeline will cost, before anything runs."""

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.exit_codes import DONE
from shoal.cli.output import json_line, table
from shoal.cli.recipe_arguments import Chosen, add_plan_arguments, add_recipe_arguments, choose
from shoal.errors import UserError
from shoal.recipe.axes import MEANING
from shoal.recipe.typed import flatten, to_mapping

if TYPE_CHECKING:
    from shoal.parallel.schedules.prediction import Costs, Prediction

HELP = "show who does what in a plan, its pipeline's timeline, idle time and memory"
WITHOUT_OWN = 2  # chunks a worker, in comparisons, of the schedules that take any number where the plan names none


@dataclass(frozen=True)
class Section:
    """A part of the answer: the same facts for programs and for people."""

    facts: dict[str, Any]  # keys of the JSON object
    text: str


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_plan_arguments(parser)
    parser.add_argument(
        "--schedules", metavar="NAMES", help="of the pipeline, instead of the plan's: all, or names with commas between"
    )
    parser.add_argument("--micro-batches", type=int, metavar="M", help="of a replica's step, instead of the recipe's")
    parser.add_argument(
        "--times", metavar="F,I,W", help="of a worker's passes; with / between, of each chunk; 1,1,1 if unset"
    )
    parser.add_argument("--link-time", type=float, default=0.0, metavar="X", help="of one message, in the same unit")
    parser.add_argument(
        "--activations",
        metavar="A[,K]",
        help="size of a worker's for one micro-batch, and of what W needs; 1,1 if unset",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the pipeline's timeline")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the schedule, to be changed and used as a plan's"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="every value of the plan and where it came from; what each layer sends along axis tensor, and why; "
        "what building the model takes of each worker's memory",
    )


def run(args: Namespace) -> int:
    chosen = choose(args)
    found = [section for make in SECTIONS if (section := make(chosen, args))]
    if args.json:
        print(json_line({key: value for section in found for key, value in section.facts.items()}))
    else:
        print("\n\n".join(section.text for section in found))
    return DONE


def workers(chosen: Chosen, args: Namespace) -> Section:
    """Who has which shards."""
    plan, recipe = chosen.plan, chosen.recipe
    groups = plan.axes.partition("pipe", "context", "tensor")
    rows = [
        {"ranks": list(ranks), "shards": list(shards)}
        for ranks, shards in zip(groups, plan.owned(recipe.shards), strict=True)
    ]
    axes = ", ".join(f"{axis} {size} ({MEANING[axis]})" for axis, size in plan.axes.sizes)
    count = "1 worker" if plan.workers == 1 else f"{plan.workers} workers"
    lines = [f"{count}: {axes}", f"{recipe.shards} shards, each of {_of(recipe.micro_batches)}"]
    shown = [(_run(row["ranks"]), _run(row["shards"])) for row in rows]
    return Section(
        {
            "workers": plan.workers,
            "mesh": dict(plan.axes.sizes),
            "replicas": rows,
            "states": {"kind": plan.states, "origin": chosen.origins["states"]},
        },
        "\n".join([*lines, table(("ranks", "shards"), shown), f"states: {plan.states} ({chosen.origins['states']})"]),
    )


def origins(chosen: Chosen, args: Namespace) -> Section | None:
    """Every value of the plan, and where it came from."""
    if not args.explain:
        return None
    rows = [(key, value, chosen.origins[key]) for key, value in flatten(to_mapping(chosen.plan)).items()]
    shown = [(key, value if isinstance(value, str) and value else json_line(value), why) for key, value, why in rows]
    facts = [{"key": key, "value": value, "origin": why} for key, value, why in rows]
    return Section({"plan": facts}, table(("key", "value", "origin"), shown))


def pipeline(chosen: Chosen, args: Namespace) -> Section | None:
    """One schedule's timeline and costs, or a table of several."""
    size = chosen.plan.axes.size("pipe")
    names = _names(args, chosen)
    asked = [
        flag for flag in ("schedules", "micro_batches", "times", "activations", "svg", "csv") if getattr(args, flag)
    ]
    if size == 1:
        if asked:
            flag = asked[0].replace("_", "-")
            raise UserError(f"--{flag} is for a plan with a pipeline: add an axis to the mesh, such as --mesh pipe=2.")
        return None
    micro_batches = _micro_batches(chosen, args)
    costs, note = _costs(args)
    from shoal.parallel.schedules.prediction import predict_all

    chunks = chosen.plan.pipeline.chunks
    if len(names) > 1:
        if args.svg or args.csv:
            raise UserError(f"--{'svg' if args.svg else 'csv'} is for one schedule, not for {len(names)}: name one.")
        found = predict_all(names, size, micro_batches, chunks if chunks > 1 else WITHOUT_OWN, costs)
        return Section({"schedules": [_facts(each) for each in found]}, "\n".join([_compared(found), "", note]))
    (only,) = predict_all(names, size, micro_batches, chunks, costs)
    _refuse_more_chunks_than_layers(chosen, only.schedule.chunks)
    written = _write(only, args)
    return Section({"pipeline": _facts(only)}, "\n".join([_shown(only), note, *written]))


def layout(chosen: Chosen, args: Namespace) -> Section | None:
    """What the layers that are split over axis tensor send."""
    ways = chosen.plan.axes.size("tensor")
    if not args.explain or ways == 1:
        return None
    from shoal.data.registry import open_data
    from shoal.parallel.layout.explain_run import explain_run, grouped

    rows = explain_run(chosen.recipe, chosen.plan, open_data(chosen.recipe.data, chosen.recipe.seed).train)
    total = sum(row.bytes for row in rows)
    shown = [
        (row.layer, count, row.direction, row.operation, f"{row.bytes / 1e6:.3f}", row.formula)
        for count, row in grouped(rows)
    ]
    lines = [
        f"axis tensor: each of {ways} workers sends {total / 1e6:.3f} MB for a micro-batch, in {len(rows)} operations",
        table(("layer", "times", "pass", "operation", "MB each", "formula, n workers"), shown),
    ]
    return Section({"layout": {"bytes": total, "rows": [asdict(row) for row in rows]}}, "\n".join(lines))


def building(chosen: Chosen, args: Namespace) -> Section | None:
    """What building the model takes of each worker's memory; a plan that this host cannot build is refused."""
    if not args.explain:
        return None
    from shoal.parallel.building_run import building_run

    rows, why = building_run(chosen.recipe, chosen.plan)
    shown = [(row.rank, *(f"{count / 1e6:.3f}" for count in (row.held, row.beside, row.peak))) for row in rows]
    lines = [
        f"building the model: {rows[0].how}{f' ({why})' if why else ''}, MB of each worker at the most",
        table(("rank", "held", "beside, on the way", "peak"), shown),
    ]
    facts = [asdict(row) | {"peak": row.peak} for row in rows]
    return Section({"building": {"how": rows[0].how, "why": why, "workers": facts}}, "\n".join(lines))


# What `shoal plan` says, in this order. A further part is one more function of the choice and the arguments.
SECTIONS: tuple[Callable[[Chosen, Namespace], Section | None], ...] = (workers, origins, pipeline, layout, building)


def _names(args: Namespace, chosen: Chosen) -> list[str]:
    from shoal.parallel.schedules.registry import MAKERS

    if args.schedules is None:
        return [chosen.plan.pipeline.schedule]
    return list(MAKERS) if args.schedules == "all" else [name.strip() for name in args.schedules.split(",")]


def _micro_batches(chosen: Chosen, args: Namespace) -> int:
    """Of the replica with the most shards."""
    if args.micro_batches is not None:
        return int(args.micro_batches)
    return max(map(len, chosen.plan.owned(chosen.recipe.shards))) * chosen.recipe.micro_batches


def _costs(args: Namespace) -> tuple["Costs", str]:
    """The costs, and a line that says what they are."""
    from shoal.parallel.schedules.prediction import Costs

    passes = [_numbers("--times", part, (3,)) for part in (args.times or "1,1,1").split("/")]
    sizes = _numbers("--activations", args.activations or "1", (1, 2))
    if args.link_time < 0:
        raise UserError(f"--link-time must not be negative, got {args.link_time:g}.")
    triples = tuple((f, i, w) for f, i, w in passes)
    costs = Costs(triples, args.link_time, sizes[0], sizes[-1])
    times = (
        f"times as given ({args.times})" if args.times else "F, I and W of a worker take 1 each (--times says others)"
    )
    link = f"a message {args.link_time:g}" if args.link_time else "messages no time"
    return costs, f"assumed: {times}, {link}; measured are none of them."


def _numbers(flag: str, text: str, counts: tuple[int, ...]) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not all(0 < number < float("inf") for number in numbers):
        wanted = " or ".join(map(str, counts))
        raise UserError(f"{flag} {text!r}: write {wanted} numbers above 0 with commas between.")
    return numbers


def _refuse_more_chunks_than_layers(chosen: Chosen, chunks: int) -> None:
    layers = chosen.recipe.model.options.get("layers")
    if isinstance(layers, int) and chunks > layers + 2:  # what comes before and after the layers may stand alone
        raise UserError(
            f"{chunks} chunks for a model of {layers} layers: use a smaller axis pipe or pipeline.chunks, "
            f"at most {layers + 2} chunks in all."
        )


def _write(found: "Prediction", args: Namespace) -> list[str]:
    from shoal.parallel.schedules.csv_file import to_csv
    from shoal.parallel.schedules.draw import timeline_svg

    lines = []
    for path, text in ((args.svg, timeline_svg), (args.csv, lambda timeline: to_csv(timeline.schedule))):
        if path:
            try:
                path.write_text(text(found.timeline), encoding="utf-8")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
                raise UserError(
                    f"cannot write {str(path)!r}: {error.strerror}: name a file in a folder of yours."
                ) from None
            lines.append(f"written: {path}")
    return lines


def _facts(found: "Prediction") -> dict[str, Any]:
    schedule = found.schedule
    return {
        "schedule": schedule.name,
        "workers": schedule.workers,
        "chunks": schedule.chunks,
        "placement": list(schedule.placement),
        "micro_batches": schedule.micro_batches,
        "span": found.timeline.span,
        "bubble": found.timeline.bubble,
        "bubble_by_formula": found.theory,
        "inner_bubble": found.timeline.inner_bubble,
        "activations": [asdict(peak) for peak in found.pairs],
        "activation_sizes": [asdict(peak) for peak in found.sizes],
        "messages": found.messages,
        "verified": True,
    }


def _shown(found: "Prediction") -> str:
    from shoal.parallel.schedules.draw import timeline_text

    schedule, line = found.schedule, found.timeline
    theory = "" if found.theory is None else f" (by formula {found.theory:.1%})"
    pairs = " ".join(f"{peak.together:g}" for peak in found.pairs)
    sizes = " ".join(f"{peak.together:g}" for peak in found.sizes)
    head = f"{schedule.name}: {schedule.chunks} chunks on {schedule.workers} workers, {_of(schedule.micro_batches)}"
    rows = [
        (
            "idle",
            f"{line.bubble:.1%} of the step{theory}; {line.inner_bubble:.1%} between a worker's first and last pass",
        ),
        ("step", f"{line.span:.6g}, {found.messages} messages between workers"),
        ("activations", f"at most {pairs} (chunk, micro-batch) pairs by worker, of size {sizes}"),
        ("verified", "each receive has its send, no deadlock with unbuffered sends, gradients added in order"),
    ]
    width = shutil.get_terminal_size().columns
    return "\n".join([head, timeline_text(line, width), *(f"{name:<12} {text}" for name, text in rows)])


def _compared(found: "tuple[Prediction, ...]") -> str:
    """Sizes and times are of a worker's share of the model, so that schedules with other chunks compare."""
    first = found[0].schedule
    rows = [
        (
            each.schedule.name,
            each.schedule.chunks // each.schedule.workers,
            f"{each.timeline.span:.6g}",
            f"{each.timeline.bubble:.1%}",
            "-" if each.theory is None else f"{each.theory:.1%}",
            f"{each.timeline.inner_bubble:.1%}",
            f"{max(peak.together for peak in each.sizes):g}",
            each.messages,
        )
        for each in found
    ]
    header = ("schedule", "chunks", "step", "idle", "formula", "inside", "activations", "messages")
    return "\n".join(
        [
            f"{first.workers} workers, {_of(first.micro_batches)}; all verified",
            table(header, rows),
            "chunks: of a worker; inside: idle between its first and last pass; activations: of the one with most.",
        ]
    )


def _of(micro_batches: int) -> str:
    return "1 micro-batch" if micro_batches == 1 else f"{micro_batches} micro-batches"


def _run(numbers: list[int]) -> str:
    """[0, 1, 2] -> "0-2"; [0, 2] -> "0 2"."""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return " ".join(map(str, numbers))
