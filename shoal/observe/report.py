"""`shoal report`: one self-contained HTML page about a run, or about several laid over each other."""

import contextlib
import os
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from shoal.errors import UserError
from shoal.observe.batch_section import read_batches
from shoal.observe.communication import read_communication
from shoal.observe.curves import read_curves
from shoal.observe.memory_section import read_memory
from shoal.observe.page import render
from shoal.observe.pipeline_section import of_run
from shoal.observe.subject import Subject
from shoal.recipe.typed import flatten, to_mapping
from shoal.run.run import Run


def write(runs: Sequence[Run], output: Path | None = None) -> Path:
    """Write the report of one run, or the comparison of several, and return where it lies.

    Without ``output``: report.html in the run's folder, or compare.html in the first run's. The page is written whole
    or not at all, and may be written while the run goes on. Raises UserError when there is no run, when a recipe
    cannot be read, or when the file cannot be written."""
    if not runs:
        raise UserError("report: name at least one run directory, such as runs/latest.")
    place = output or (runs[0].report if len(runs) == 1 else runs[0].path / "compare.html")
    names = _names([run.path for run in runs])
    folder = resources.files("shoal.observe")
    page = render(
        [_subject(run, name) for run, name in zip(runs, names, strict=True)],
        style=(folder / "style.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        now=time.time(),
    )
    part = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        part.write_text(page, encoding="utf-8", errors="replace", newline="\n")
        part.replace(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write the report {str(place)!r}: {error.strerror}.") from None
    return place


def _subject(run: Run, name: str) -> Subject:
    recipe, plan, events = run.recipe, run.plan, list(run.events())
    curves = read_curves(events)
    return Subject(
        name=name,
        path=str(run.path),
        recipe=flatten(to_mapping(recipe)),
        plan=flatten(to_mapping(plan)),
        origins=run.origins,
        curves=curves,
        result=run.result or curves.result,
        recipe_hash=recipe.arithmetic_hash,
        communication=read_communication(events),
        memory=read_memory(events),
        pipeline=of_run(run, events),
        batches=read_batches(events),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents before them as it takes to tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]
