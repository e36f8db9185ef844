"""The Run: a directory with recipe, plan, event log, checkpoints and report. Verbs pass nothing else on."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.events import EventLog, read_events
from shoal.run.hold import held


@dataclass(frozen=True)
class Run:
    path: Path

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_toml(self.path / "recipe.toml")

    @property
    def plan(self) -> Plan:
        return Plan.from_toml(self.path / "plan.toml")

    @property
    def origins(self) -> dict[str, str]:
        """Dotted key -> where its value came from: "default", "file recipe.toml", "flag --steps", "measured", ..."""
        file = self.path / "origins.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def result(self) -> dict[str, Any] | None:
        """What `train` returned, once it has ended."""
        file = self.path / "result.json"
        return dict(json.loads(file.read_text())) if file.exists() else None

    @property
    def data(self) -> dict[str, Any] | None:
        """What a model of this run needs to know of the data, as shoal.data.description has it; None in older runs."""
        file = self.path / "data.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def keep_data(self, description: Mapping[str, Any]) -> None:
        """A full disk is no failure: who serves the run will need the data themselves."""
        fresh = self.path / ".data.json.new"
        with suppress(OSError):
            fresh.write_text(json.dumps(description), encoding="utf-8")
            os.replace(fresh, self.path / "data.json")

    def events(self) -> list[dict[str, Any]]:
        return list(read_events(self.path / "events.jsonl"))

    def held(self, really: bool) -> AbstractContextManager[None]:
        """No other run may go on with this one while the context is open, if ``really``. Raises UserError."""
        return held(self.path) if really else nullcontext()

    def open_log(self) -> EventLog:
        return EventLog(self.path / "events.jsonl")

    @staticmethod
    def create(recipe: Recipe, plan: Plan, origins: Mapping[str, str], path: Path | None = None) -> "Run":
        """Make the directory and write recipe, plan and origins into it.

        Without a path: runs/<model>-<time> under the working directory, and runs/latest points at it.
        Raises UserError when the path holds a run already or cannot be written."""
        chosen = path or Path("runs") / f"{recipe.model.kind}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            if path is None:
                chosen = _of_its_own(chosen)
            run = Run(chosen.absolute())
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            with _claimed(chosen):
                run.write_inputs(recipe, plan, origins)
            if path is None:
                fresh = chosen.parent / f".latest-{chosen.name}"  # of this run alone: others may be made at this moment
                fresh.symlink_to(chosen.name)
                os.replace(fresh, chosen.parent / "latest")
        except OSError as error:
            raise UserError(f"cannot write the run directory {str(chosen)!r}: {error.strerror}.") from None
        return run

    def write_inputs(self, recipe: Recipe, plan: Plan, origins: Mapping[str, str]) -> None:
        """Each file is replaced whole: a full disk leaves the old one as it was. Raises UserError."""
        texts = {
            "recipe.toml": recipe.to_toml(),
            "plan.toml": plan.to_toml(),
            "origins.json": json.dumps(dict(origins), indent=1),
        }
        try:
            for name, text in texts.items():
                fresh = self.path / f".{name}.new"
                fresh.write_text(text, encoding="utf-8")
                os.replace(fresh, self.path / name)
        except OSError as error:
            raise UserError(f"cannot write the run directory {str(self.path)!r}: {error.strerror}.") from None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Raises UserError."""
        file = self.path / "result.json"
        try:
            file.write_text(json.dumps(result, indent=1))
        except OSError as error:
            raise UserError(
                f"cannot write {str(file)!r}: {error.strerror}: the checkpoints are whole; make room and resume."
            ) from None

    @staticmethod
    def find(target: str | Path) -> "Run":
        """The run in a folder; "latest" is the newest one under ./runs. Raises UserError when there is none."""
        path = Path("runs/latest") if str(target) == "latest" else Path(target)
        if not os.path.exists(path / "recipe.toml"):  # Path.exists raises where a name is too long
            there = ["latest", *(str(file.parent) for file in Path("runs").glob("*/recipe.toml"))]
            near = get_close_matches(str(target), there, n=1) if len(there) > 1 else []
            hint = f"did you mean {near[0]!r}?" if near else "a run directory holds recipe.toml. Try `shoal train`."
            raise UserError(f"no run in {str(path)!r}: {hint}")
        return Run(path.resolve())

    @staticmethod
    def check_new(path: Path) -> None:
        """Raises UserError when the path holds a run already."""
        if (path / "recipe.toml").exists():
            raise _not_new(path)

    @staticmethod
    def check_place(path: Path | None) -> None:
        """Raises UserError where no run can be made in ``path`` (None: under ./runs), before anything is spent."""
        wished = (path or Path("runs")).absolute()
        there = next(place for place in (wished, *wished.parents) if os.path.exists(place))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "cannot be written" if there.is_dir() else "is no folder"
            raise UserError(f"cannot write the run directory {str(path or wished)!r}: {str(there)!r} {why}.")
        try:
            wished.lstat()
        except FileNotFoundError:
            pass
        except OSError as error:  # too long a name
            raise UserError(f"cannot write the run directory {str(path)!r}: {error.strerror}.") from None


def _not_new(path: Path) -> UserError:
    return UserError(f"{str(path)!r} holds a run already: continue it with --resume, or name another folder.")


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Of all that make a run in this folder at this moment, one comes in here: what it writes is the run's.

    Raises UserError for the others, OSError."""
    recipe = path / "recipe.toml"
    try:
        recipe.touch(exist_ok=False)
    except FileExistsError:
        raise _not_new(path) from None
    try:
        yield
    except BaseException:
        recipe.unlink(missing_ok=True)  # a full disk, say: the folder may be tried again
        raise


def _of_its_own(wished: Path) -> Path:
    """A folder that this call makes, and no other one that runs at this moment: ``wished``, or with _2, _3, ... behind.

    Raises OSError."""
    wished.parent.mkdir(parents=True, exist_ok=True)
    chosen, number = wished, 1
    while True:
        try:
            chosen.mkdir()
            return chosen
        except FileExistsError:
            number += 1
            chosen = wished.with_name(f"{wished.name}_{number}")


def origin(target: str) -> tuple[Run, int]:
    """The run and the step that "RUN@STEP" names. Raises UserError."""
    folder, at, step = target.rpartition("@")
    if not at or not step.isdecimal():
        raise UserError(f"--from {target!r}: write it as RUN@STEP, such as runs/latest@120.")
    return Run.find(folder), int(step)
