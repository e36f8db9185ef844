"""One tiny model of each kind and head, with data that fits it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoal.models.registry import build, task_for
from shoal.models.task import Task
from shoal.recipe.recipe import ModelSpec

VOCAB, CONTEXT, SAMPLES, CLASSES = 17, 12, 3, 4


def _tokens(length: int) -> Tensor:
    return torch.randint(VOCAB, (SAMPLES, length), generator=torch.Generator().manual_seed(1))


def _floats(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(1))


TEXT = {"vocab": VOCAB, "context": CONTEXT}
WINDOWS = {"tokens": _tokens(CONTEXT + 1)}
FRAMED = {
    "tokens": _tokens(CONTEXT),
    "mask": torch.arange(CONTEXT) < torch.tensor([[CONTEXT], [11], [9]]),
    "types": (torch.arange(CONTEXT) > 4).long().expand(SAMPLES, -1),
}
LABELS = {"target": torch.tensor([0, 3, 1])}
IMAGES = {"input": _floats(1, 12, 12), **LABELS}


@dataclass(frozen=True)
class Tiny:
    spec: ModelSpec
    facts: Mapping[str, Any]
    batch: Mapping[str, Tensor] = field(repr=False)

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return build(self.spec, self.facts)

    @property
    def task(self) -> Task:
        return task_for(self.spec, self.facts)


def _spec(kind: str, task: str = "", **options: Any) -> ModelSpec:
    return ModelSpec(kind=kind, task=task, options=options)


_BERT = {"layers": 2, "heads": 2, "width": 16, "dropout": 0.0}
TINY: dict[str, Tiny] = {
    "mlp": Tiny(_spec("mlp", hidden=(8, 6)), {"shape": (1, 12, 12), "classes": CLASSES}, IMAGES),
    "mlp-regression": Tiny(
        _spec("mlp", hidden=(8,)), {"features": 5, "outputs": 2}, {"input": _floats(5), "target": _floats(2)}
    ),
    "cnn": Tiny(_spec("cnn", channels=(4, 6), hidden=8), {"shape": (12, 12), "classes": CLASSES}, IMAGES),
    "cnn-norm": Tiny(
        _spec("cnn", channels=(4,), hidden=8, norm=True), {"shape": [1, 12, 12], "classes": CLASSES}, IMAGES
    ),
    "resnet-cifar": Tiny(_spec("resnet", depth=8, width=4), {"shape": (1, 12, 12), "classes": CLASSES}, IMAGES),
    "resnet-18": Tiny(
        _spec("resnet", style="imagenet", depth=18, width=2), {"shape": (1, 12, 12), "classes": CLASSES}, IMAGES
    ),
    "resnet-50": Tiny(
        _spec("resnet", style="imagenet", depth=50, width=2), {"shape": (1, 12, 12), "classes": CLASSES}, IMAGES
    ),
    "lstm": Tiny(_spec("lstm", width=8, hidden=10), TEXT, WINDOWS),
    "lstm-tied": Tiny(_spec("lstm", width=8, tied=True), TEXT, WINDOWS),
    "elmo": Tiny(_spec("elmo", width=8), TEXT, WINDOWS),
    "elmo-untied": Tiny(_spec("elmo", width=8, tied=False, layers=3), TEXT, WINDOWS),
    "gpt": Tiny(_spec("gpt", layers=2, heads=2, width=16), TEXT, WINDOWS),
    "gpt-untied": Tiny(_spec("gpt", layers=2, heads=2, width=16, tied=False, bias=False), TEXT, WINDOWS),
    "moe": Tiny(_spec("moe", layers=2, heads=2, width=16, experts=4), TEXT, WINDOWS),
    "moe-top-1": Tiny(_spec("moe", layers=1, heads=2, width=16, experts=2, top_k=1, bias=False), TEXT, WINDOWS),
    "bert-masked": Tiny(_spec("bert", "masked-language-model", **_BERT), TEXT, FRAMED),
    "bert-classification": Tiny(_spec("bert", **_BERT), {**TEXT, "classes": CLASSES}, {**FRAMED, **LABELS}),
    "bert-answers": Tiny(
        _spec("bert", "question-answering", **_BERT),
        TEXT,
        {**FRAMED, "start": torch.tensor([1, 2, 0]), "end": torch.tensor([3, 2, 0])},
    ),
}
