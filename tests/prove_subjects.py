"""Tiny recipes with data that fits them; sources that any process can be handed."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.data.source import Splits
from shoal.recipe.recipe import ModelSpec, OptimizerSpec, Recipe

SAMPLES, SHARDS, BATCH = 25, 5, 10  # the third step of an epoch has 5 samples, one a shard and none for the rest


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@dataclass
class Held:
    """Samples in memory."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    fingerprint: str = field(default="held")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def fetch(self, ids: Any, epoch: int) -> dict[str, Tensor]:
        return {name: tensor[torch.tensor(ids)] for name, tensor in self.tensors.items()}


def words(samples: int = SAMPLES) -> Splits:
    return Splits(Held({"tokens": torch.randint(13, (samples, 9), generator=_draw())}, {"vocab": 13, "context": 8}))


def digits(samples: int = SAMPLES) -> Splits:
    pictures = torch.randn(samples, 1, 12, 12, generator=_draw())
    labels = torch.randint(4, (samples,), generator=_draw())
    return Splits(Held({"input": pictures, "target": labels}, {"shape": (1, 12, 12), "classes": 4}))


def _recipe(model: ModelSpec, **given: Any) -> Recipe:
    return Recipe(model=model, **{"batch": BATCH, "shards": SHARDS, "steps": 1, "precision": "float32", **given})


RECIPES = {
    "gpt": _recipe(
        ModelSpec(kind="gpt", options={"layers": 1, "heads": 2, "width": 8, "dropout": 0.2}), clip=0.5, micro_batches=2
    ),
    "lstm": _recipe(ModelSpec(kind="lstm", options={"width": 6, "hidden": 7, "dropout": 0.2}), precision="bfloat16"),
    "cnn": _recipe(
        ModelSpec(
            kind="cnn", options={"channels": (3,), "hidden": 700, "norm": True}
        ),  # three blocks of the flat order
        clip=0.5,
        optimizer=OptimizerSpec(name="sgd", lr=0.1, options={"momentum": 0.9}),
    ),
    "mlp": _recipe(ModelSpec(kind="mlp", options={"hidden": (6,)})),
}


def data_of(name: str, samples: int = SAMPLES) -> Splits:
    return words(samples) if name in ("gpt", "lstm") else digits(samples)


def halves(samples: int = 16) -> Splits:
    """Inputs 0 and 1 in turns, which are their own classes."""
    labels = torch.arange(samples) % 2
    return Splits(Held({"input": labels.float().unsqueeze(1), "target": labels}, {"classes": 2, "shape": (1,)}))


class _MinusZero(torch.autograd.Function):
    """Passes ``y`` through; the gradient of ``weight`` is -0.0."""

    @staticmethod
    def forward(context: Any, weight: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor([-0.0]), gradients[0]


class SometimesUsed(torch.nn.Module):
    """``rare`` takes part only in micro-batches that begin with a 1, and its gradient is -0.0 there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)
        self.rare = torch.nn.Parameter(torch.tensor([-0.0]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return _MinusZero.apply(self.rare, y) if bool(x[0, 0] > 0) else y


class OneLayer(torch.nn.Module):
    """No pipeline of three stages can be cut from it."""

    def __init__(self) -> None:
        super().__init__()
        self.only = torch.nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.only(x)
        return y
