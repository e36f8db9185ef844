"""How close a run is to the reference where its additions are made in another order, from values, step by step.

A gradient's deviation counts relative to the norm of the whole gradient, a shard's loss relative to itself. A weight's
largest deviation counts relative to the largest element of its tensor, or to a hundredth of the model's largest.

Weights count with plain SGD, or in float64. Elsewhere they are no measure: where a gradient is zero but for rounding (a
bias before a normalisation, the bias of attention keys), Adam divides the rounding by itself, and the weight wanders
without any effect on the loss.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.errors import UserError
from shoal.prove.fingerprint import GRADIENT, LOSS, MODEL, Difference

COMPARED = (GRADIENT, MODEL)  # kinds of tensors, in this order
SMALL = 0.01  # of the largest weight: below, a tensor's own size is no measure


@dataclass(frozen=True)
class Deviation:
    step: int
    tensor: str
    size: float
    shards: tuple[int, ...] = ()


@dataclass(frozen=True)
class Deviations:
    """Of one step: how far each tensor, and each shard's loss, is from the reference's."""

    step: int
    tensors: Mapping[str, float]  # gradient/..., model/..., in the model's order
    losses: tuple[float, ...]  # of each shard

    def __iter__(self) -> Iterator[Deviation]:
        for name, size in self.tensors.items():
            yield Deviation(self.step, name, size)
        for shard, size in enumerate(self.losses):
            yield Deviation(self.step, LOSS, size, (shard,))


def file_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.safetensors"


def check_room(folder: Path, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Raises UserError when what `keep` will write in all steps does not fit on the disk."""
    needed = steps * sum(tensor.nbytes for tensor in _of_kinds(tensors, COMPARED).values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"a proof within a tolerance keeps gradients and weights of {steps} steps, {needed / 1e9:.1f} GB, and "
            f"{str(folder.parent)!r} has {free / 1e9:.1f} GB to spare: use fewer --steps, or set TMPDIR."
        )


def keep(folder: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """The reference's gradients and weights after a step."""
    save(file_of(folder, step), _of_kinds(tensors, COMPARED))


def save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Each has memory of its own in the file, whatever they share."""
    copies = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_file(copies, file)


def _of_kinds(tensors: Mapping[str, Tensor], kinds: Sequence[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.partition("/")[0] in kinds}


@torch.no_grad()
def deviations(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    wanted: Sequence[float],
    losses: Sequence[float],
    kinds: Sequence[str] = COMPARED,
) -> Deviations:
    """``tensors``: a run's gradients and weights after the step, whole; ``losses`` of its shards, and those wanted."""
    expected = _of_kinds(load_file(file_of(folder, step)), kinds)
    apart = tensor_deviations(expected, tensors)
    return Deviations(step, apart, tuple(map(relative, wanted, losses)))


def tensor_deviations(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float]:
    """Of gradients and weights by name; inf for one that is missing, left over, of another shape or not finite."""
    gradients = {n: t for n, t in expected.items() if n.startswith(f"{GRADIENT}/")}
    whole = math.hypot(*(float(torch.linalg.vector_norm(t.double())) for t in gradients.values())) or 1.0
    least = SMALL * max((_largest(t) for n, t in expected.items() if n.startswith(f"{MODEL}/")), default=1.0)
    sizes: dict[str, float] = {}
    for name in _of_kinds({**found, **expected}, COMPARED):
        wanted, have = expected.get(name), found.get(name)
        if wanted is None or have is None or wanted.shape != have.shape:
            sizes[name] = math.inf
        elif not wanted.is_floating_point():
            sizes[name] = 0.0 if torch.equal(wanted, have.cpu()) else math.inf
        else:
            apart = have.cpu().double() - wanted.double()
            if name in gradients:
                sizes[name] = _finite(float(torch.linalg.vector_norm(apart)) / whole)
            else:
                scale = max(_largest(wanted), least) or 1.0
                sizes[name] = _finite(_largest(apart) / scale)
    return {name: sizes[name] for kind in COMPARED for name in sizes if name.startswith(f"{kind}/")}


def relative(wanted: float, found: float) -> float:
    """A deviation from a number, relative to it; from 0.0, as it is."""
    return _finite(abs(wanted - found) / (abs(wanted) or 1.0))


def _largest(tensor: Tensor) -> float:
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    return float(tensor.abs().max())


def _finite(size: float) -> float:
    return size if math.isfinite(size) else math.inf


def of_kinds(found: Sequence[Deviations], *, weights: bool) -> list[Deviation]:
    """All deviations in order; those of weights only where they are a measure."""
    return [d for step in found for d in step if weights or not d.tensor.startswith(f"{MODEL}/")]


def first_beyond(found: Sequence[Deviation], tolerance: float, workers: int) -> Difference | None:
    """The first deviation above the tolerance, and the shards whose loss deviates at that step."""
    beyond = [deviation for deviation in found if deviation.size > tolerance]
    if not beyond:
        return None
    first = beyond[0]
    here = [deviation for deviation in beyond if deviation.step == first.step]
    shards = tuple(shard for deviation in here for shard in deviation.shards)
    tensors = tuple(deviation.tensor for deviation in here if not deviation.shards)
    return Difference(first.step, first.tensor, tuple(range(workers)), shards, tensors)
