"""Fingerprints of what a run holds after a step, and the first place where two runs part."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shoal.train.state import model_tensors, optimizer_tensors
from shoal.train.weights import byte_pieces

LOSS = "loss"  # the name of a difference in the losses alone


class TensorPrint(NamedTuple):
    sha256: str
    norm: float  # L2, in float64: what is left to compare where bits may differ


@dataclass(frozen=True)
class StepPrint:
    """What one process held after a committed step."""

    step: int  # from 1
    losses: tuple[float, ...]  # summed over each shard
    tensors: Mapping[str, TensorPrint]  # gradient/..., model/..., optimizer/..., in this order


@dataclass(frozen=True)
class Difference:
    """The first place where a run is not like the reference."""

    step: int
    tensor: str
    ranks: tuple[int, ...]  # the workers that differ there
    shards: tuple[int, ...]  # shards whose loss differs at this step: none where only the sums went wrong


def training_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and the optimiser's state by name."""
    state = {f"model/{name}": tensor for name, tensor in model_tensors(module).items()}
    return state | {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(module, optimizer).items()}


def step_print(step: int, losses: Sequence[float], module: nn.Module, optimizer: torch.optim.Optimizer) -> StepPrint:
    """The fingerprint of a step that has just been committed, its gradients still hanging on the parameters."""
    gradients = {f"gradient/{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    tensors = gradients | training_tensors(module, optimizer)
    return StepPrint(step, tuple(losses), {name: tensor_print(tensor) for name, tensor in tensors.items()})


def weights_of(prints: StepPrint) -> StepPrint:
    """The same without gradients and the optimiser's state."""
    return replace(prints, tensors={n: p for n, p in prints.tensors.items() if n.startswith("model/")})


def tensor_print(tensor: Tensor) -> TensorPrint:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for piece in byte_pieces(tensor):
        digest.update(piece)
    norm = torch.linalg.vector_norm(tensor.detach().double())
    return TensorPrint(digest.hexdigest(), float(norm))


def first_difference(reference: Sequence[StepPrint], workers: Sequence[Sequence[StepPrint]]) -> Difference | None:
    """Where any bit of the workers first differs from the reference's, over the steps that they have done."""
    for number, expected in enumerate(reference):
        here = {rank: prints[number] for rank, prints in enumerate(workers) if number < len(prints)}
        shards = tuple(
            shard for shard, loss in enumerate(expected.losses) if any(p.losses[shard] != loss for p in here.values())
        )
        for name in dict.fromkeys(name for prints in (expected, *here.values()) for name in prints.tensors):
            ranks = tuple(rank for rank, p in here.items() if _bits(p, name) != _bits(expected, name))
            if ranks:
                return Difference(expected.step, name, ranks, shards)
        if shards:
            return Difference(expected.step, LOSS, tuple(here), shards)
    return None


def _bits(prints: StepPrint, name: str) -> str | None:
    found = prints.tensors.get(name)
    return found.sha256 if found else None
