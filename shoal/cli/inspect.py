"""``shoal inspect``: show, verify and compare checkpoints."""

import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shoal.cli.exit_codes import DONE, FAILED
from shoal.cli.output import duration, json_line, table

if TYPE_CHECKING:
    from shoal.train.checkpoint_views import CheckpointView, DifferenceView, FolderView

HELP = "show, verify and compare checkpoints"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a run ('latest': the newest), its checkpoints, or one of them")
    parser.add_argument("other", metavar="PATH2", nargs="?", help="a second one: show what differs")
    parser.add_argument("--verify", action="store_true", help="read every byte, and list all that is wrong")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, the last line of stdout")


def run(args: Namespace) -> int:
    """0: whole, or equal. 1: something is broken or differs."""
    from shoal.train import checkpoint_views

    seen = checkpoint_views.view(args.path, args.other, args.verify)
    if args.json:
        print(json_line({"ok": seen.ok, **_summary(seen), **asdict(seen)}))
    elif isinstance(seen, checkpoint_views.FolderView):
        print(_folder(seen, args.verify))
    elif isinstance(seen, checkpoint_views.CheckpointView):
        print(_checkpoint(seen))
    else:
        print(_difference(seen))
    return DONE if seen.ok else FAILED


def _summary(seen: object) -> dict[str, Any]:
    found = getattr(seen, "difference", None)
    return {"first_different": found.first, "max_abs": found.max_abs} if found else {}


def _folder(seen: "FolderView", verified: bool) -> str:
    if not seen.checkpoints:
        return f"no checkpoints in {seen.path}"
    best = next((listed for listed in seen.checkpoints if listed.best and not listed.problem), None)
    rows = [
        (
            listed.path.name,
            _size(listed.bytes) if listed.saved_at else "-",
            duration(time.time() - listed.saved_at) if listed.saved_at else "-",
            "best" if listed is best else "",
            listed.problem or ("whole" if verified else "whole (sizes)"),
        )
        for listed in seen.checkpoints
    ]
    return table(("checkpoint", "size", "age", "", "state"), rows)


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


def _checkpoint(seen: "CheckpointView") -> str:
    parts = [str(seen.path)]
    if seen.facts:
        parts.append(table(("fact", "value"), [(key, json_line(value)) for key, value in seen.facts.items()]))
    if seen.problems:
        return "\n\n".join([*parts, "\n".join(["broken:", *seen.problems])])
    rows = [(t.name, list(t.shape), t.dtype, f"{t.norm:.6g}") for t in seen.tensors]
    parts.append(table(("tensor", "shape", "dtype", "norm"), rows))
    return "\n\n".join([*parts, f"whole. weights_sha256 {seen.weights_sha256}"])


def _difference(seen: "DifferenceView") -> str:
    found = seen.difference
    lines = [f"first   {seen.first}", f"second  {seen.second}"]
    lines += [f"fact {key}: {json_line(a)} against {json_line(b)}" for key, (a, b) in seen.facts.items()]
    lines += [f"only in the first: {name}" for name in found.only_first]
    lines += [f"only in the second: {name}" for name in found.only_second]
    lines += [f"{name}: {a} against {b}" for name, a, b in found.unlike]
    if found.changed:
        rows = [(c.name, f"{c.max_abs:.6g}", f"{c.elements} of {c.of}") for c in found.changed]
        lines.append(table(("tensor", "max abs difference", "elements that differ"), rows))
    if seen.ok:
        return "\n".join([*lines, f"equal: all {found.equal} tensors have the same bits."])
    lines.append(f"different: {found.equal} tensors are equal, the first that differs is {found.first}.")
    return "\n".join(lines)
