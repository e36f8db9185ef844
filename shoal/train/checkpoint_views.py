"""What can be seen of checkpoints: a folder of them, one, or two side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.run.run import Run
from shoal.train import checkpoint
from shoal.train.checkpoint_diff import Difference, compare, norm
from shoal.train.weights import weights_sha256


@dataclass(frozen=True)
class FolderView:
    path: Path
    checkpoints: tuple[checkpoint.Listed, ...]  # newest first

    @property
    def ok(self) -> bool:
        return not any(listed.problem for listed in self.checkpoints)


@dataclass(frozen=True)
class TensorView:
    name: str
    shape: tuple[int, ...]
    dtype: str  # as torch prints it, without "torch."
    norm: float  # Euclidean


@dataclass(frozen=True)
class CheckpointView:
    path: Path
    problems: tuple[str, ...]  # (): whole
    facts: Mapping[str, Any]  # empty when the manifest is broken
    tensors: tuple[TensorView, ...]  # in name order; empty when it is broken
    weights_sha256: str  # of the tensors under "model/", without that prefix; "" when it is broken

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class DifferenceView:
    """Two checkpoints. They are equal when their tensors are; facts such as the time do not count."""

    first: Path
    second: Path
    difference: Difference
    facts: Mapping[str, tuple[Any, Any]]  # the facts that differ: key -> value in the first and in the second

    @property
    def ok(self) -> bool:
        return self.difference.first is None


def view(
    path: str | Path, other: str | Path | None = None, verify: bool = False
) -> FolderView | CheckpointView | DifferenceView:
    """Look at a run, a folder of checkpoints or one checkpoint; with ``other``, at two checkpoints side by side, where
    a run or a folder stands for its newest whole checkpoint. "latest" is the newest run under ./runs.

    ``verify``: re-hash every file of a folder's checkpoints, and list all damage of a single one, not only the first.
    Raises UserError when there is nothing there to look at, CheckpointError when one of two is broken."""
    if other is not None:
        first, second = _one(path), _one(other)
        return _difference(first, second)
    place = _place(path)
    if _is_checkpoint(place):
        return _checkpoint(place, verify)
    return FolderView(place, tuple(checkpoint.listing(place, verify)))


def _place(target: str | Path) -> Path:
    """A checkpoint, or a folder of checkpoints."""
    path = Path(target)
    if str(target) == "latest" and not path.exists():
        return Run.find("latest").checkpoints
    if _is_checkpoint(path):
        return path
    if (path / "recipe.toml").exists() or (path / "checkpoints").is_dir():
        return path / "checkpoints"
    if path.is_dir() and (checkpoint.listing(path) or path.name == "checkpoints"):
        return path
    raise UserError(f"no run and no checkpoint in {str(path)!r}: give a run, its checkpoints folder or one of them.")


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and (checkpoint.is_folder_name(path.name) or (path / checkpoint.MANIFEST).exists())


def _one(target: str | Path) -> Path:
    place = _place(target)
    if _is_checkpoint(place):
        return place
    path = checkpoint.newest(place)[1]
    if path is None:
        raise UserError(f"no whole checkpoint in {str(place)!r}: `shoal inspect {place} --verify` says why.")
    return path


def _checkpoint(path: Path, verify: bool) -> CheckpointView:
    try:
        loaded = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        problems = checkpoint.damage(path) if verify else [str(error)]
        return CheckpointView(path, tuple(problems), _facts_if_readable(path), (), "")
    tensors = tuple(
        TensorView(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), norm(tensor))
        for name, tensor in sorted(loaded.tensors.items())
    )
    model = {name.removeprefix("model/"): t for name, t in loaded.tensors.items() if name.startswith("model/")}
    return CheckpointView(path, (), loaded.facts, tensors, weights_sha256(model))


def _facts_if_readable(path: Path) -> Mapping[str, Any]:
    try:
        return checkpoint.read_manifest(path).facts
    except checkpoint.CheckpointError:
        return {}


def _difference(first: Path, second: Path) -> DifferenceView:
    a, b = checkpoint.load(first), checkpoint.load(second)
    keys = sorted(a.facts.keys() | b.facts.keys())
    facts = {key: (a.facts.get(key), b.facts.get(key)) for key in keys if a.facts.get(key) != b.facts.get(key)}
    return DifferenceView(first, second, compare(a.tensors, b.tensors), facts)
