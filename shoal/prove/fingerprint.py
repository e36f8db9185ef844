"""Fingerprints of what a run holds after a step, and the first place where two runs part."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shoal.train.state import model_tensors, optimizer_tensors
from shoal.train.weights import byte_pieces

LOSS = "loss"  # the name of a difference in the losses alone
GRADIENT, MODEL, OPTIMIZER = "gradient", "model", "optimizer"
KINDS = (GRADIENT, MODEL, OPTIMIZER)


class TensorPrint(NamedTuple):
    sha256: str
    norm: float  # L2, in float64
    along: float = 0.0  # its part along a fixed direction: of sums, it tells which terms they have


@dataclass(frozen=True)
class StepPrint:
    """What one process held after a committed step."""

    step: int  # from 1
    losses: tuple[float, ...]  # summed over each shard
    tensors: Mapping[str, TensorPrint]  # gradient/..., model/..., optimizer/..., in this order
    shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # of the reference: what each shard adds to
    # a gradient, along its fixed direction


@dataclass(frozen=True)
class Difference:
    """The first place where a run is not like the reference."""

    step: int
    tensor: str
    ranks: tuple[int, ...]  # the workers that differ there
    shards: tuple[int, ...]  # shards whose loss differs at this step: none where only the sums went wrong
    tensors: tuple[str, ...] = ()  # all that differ at this step

    @property
    def layer(self) -> str:
        """The module that the tensor belongs to; "" where losses alone differ."""
        return layer_of(self.tensor)

    @property
    def layers(self) -> tuple[str, ...]:
        """Of all tensors that differ at this step, in the model's order."""
        return tuple(dict.fromkeys(map(layer_of, self.tensors)))


def layer_of(tensor: str) -> str:
    """ "gradient/blocks.0.up.weight" -> "blocks.0.up", "optimizer/bias/step" -> "bias"."""
    kind, _, name = tensor.partition("/")  # a loss has no name
    if kind == OPTIMIZER:
        name = name.rpartition("/")[0]
    return name.rpartition(".")[0] or name


def training_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and the optimiser's state by name."""
    state = {f"{MODEL}/{name}": tensor for name, tensor in model_tensors(module).items()}
    return state | {f"{OPTIMIZER}/{name}": tensor for name, tensor in optimizer_tensors(module, optimizer).items()}


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Those that still hang on the parameters of a step that has just been committed."""
    return {f"{GRADIENT}/{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}


def step_print(step: int, losses: Sequence[float], tensors: Mapping[str, Tensor]) -> StepPrint:
    return StepPrint(step, tuple(losses), {name: tensor_print(tensor) for name, tensor in tensors.items()})


def tensor_print(tensor: Tensor) -> TensorPrint:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for piece in byte_pieces(tensor):
        digest.update(piece)
    wide = tensor.detach().double()
    return TensorPrint(digest.hexdigest(), float(torch.linalg.vector_norm(wide)), along(wide))


@torch.no_grad()
def along(tensor: Tensor) -> float:
    """The sum of the elements, each times one drawn for its place: linear, so a sum's is the sum of its terms'."""
    return float(tensor.detach().reshape(-1).double().cpu() @ _direction(tensor.numel()))


@lru_cache(maxsize=64)
def _direction(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)


def first_difference(
    reference: Sequence[StepPrint],
    workers: Sequence[Sequence[StepPrint]],
    kinds: Sequence[Sequence[str]] | None = None,
    *,
    parts: bool = False,
) -> Difference | None:
    """Where any bit of the workers first differs from the reference's, over the steps that they have done.

    ``kinds``: of each worker, the kinds of tensors that it can show; all, if None. ``parts``: a worker may hold some
    of the tensors only, as long as another one has the rest."""
    for number, expected in enumerate(reference):
        here = {rank: prints[number] for rank, prints in enumerate(workers) if number < len(prints)}
        shards = tuple(
            shard for shard, loss in enumerate(expected.losses) if any(p.losses[shard] != loss for p in here.values())
        )
        found: dict[str, tuple[int, ...]] = {}
        for name in dict.fromkeys(name for prints in (expected, *here.values()) for name in prints.tensors):
            shown = [rank for rank in here if kinds is None or name.partition("/")[0] in kinds[rank]]
            if parts:
                shown = [rank for rank in shown if name in here[rank].tensors] or shown
            ranks = tuple(rank for rank in shown if _bits(here[rank], name) != _bits(expected, name))
            if ranks:
                found[name] = ranks
        if found:
            first = next(iter(found))
            return Difference(expected.step, first, found[first], shards, tuple(found))
        if shards:
            return Difference(expected.step, LOSS, tuple(here), shards)
    return None


def first_disagreement(
    groups: Sequence[Sequence[int]],
    workers: Sequence[Sequence[StepPrint]],
    kinds: Sequence[Sequence[str]] | None = None,
) -> Difference | None:
    """Where workers that should hold the same first do not; ``groups`` of their ranks. It names the later ones.

    ``kinds``: see `first_difference`."""
    found = [
        replace(differs, ranks=tuple(group[rank] for rank in differs.ranks))
        for group in groups
        if (
            differs := first_difference(
                workers[group[0]], [workers[rank] for rank in group], kinds and [kinds[rank] for rank in group]
            )
        )
    ]
    return min(found, key=lambda differs: differs.step, default=None)


def _bits(prints: StepPrint, name: str) -> str | None:
    found = prints.tensors.get(name)
    return found.sha256 if found else None
