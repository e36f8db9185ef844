"""Recipes of a second or less, with data made from a formula."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from shoal.data.source import Batch, Splits
from shoal.recipe.recipe import ModelSpec, OptimizerSpec, Recipe, Reporting, ScheduleSpec

VOCAB, CONTEXT, CLASSES = 31, 8, 5


@dataclass(frozen=True)
class Images:
    """Noise around one picture a class: [n, 1, 8, 8]."""

    samples: int
    seed: int = 0

    def __len__(self) -> int:
        return self.samples

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"shape": (1, 8, 8), "classes": CLASSES}

    @property
    def fingerprint(self) -> str:
        return f"images {self.samples} {self.seed}"

    def fetch(self, ids: np.ndarray, epoch: int) -> Batch:
        classes = (ids * 7 + self.seed) % CLASSES
        pictures = np.random.default_rng(1).normal(size=(CLASSES, 1, 8, 8))
        noise = np.stack([np.random.default_rng((int(i), self.seed)).normal(size=(1, 8, 8)) for i in ids])
        return {
            "input": torch.from_numpy((pictures[classes] + noise).astype(np.float32)),
            "target": torch.from_numpy(classes.astype(np.int64)),
        }


@dataclass(frozen=True)
class Words:
    """Windows of a periodic text: tokens [n, CONTEXT + 1]."""

    samples: int
    seed: int = 0

    def __len__(self) -> int:
        return self.samples

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"vocab": VOCAB, "context": CONTEXT}

    @property
    def fingerprint(self) -> str:
        return f"words {self.samples} {self.seed}"

    def fetch(self, ids: np.ndarray, epoch: int) -> Batch:
        start = ids[:, None].astype(np.int64) * 3 + np.arange(CONTEXT + 1)[None] + self.seed
        return {"tokens": torch.from_numpy((start * start) % VOCAB)}


def model(kind: str) -> ModelSpec:
    options: dict[str, dict[str, Any]] = {
        "mlp": {"hidden": (9,)},
        "cnn": {"channels": (4, 6), "hidden": 10, "dropout": 0.2},
        "resnet": {"depth": 8, "width": 4},
        "lstm": {"width": 12, "layers": 2, "dropout": 0.1},
        "elmo": {"width": 8, "layers": 2},
        "gpt": {"layers": 2, "heads": 2, "width": 16, "dropout": 0.1},
        "moe": {"layers": 2, "heads": 2, "width": 16, "experts": 4, "dropout": 0.1},
    }
    return ModelSpec(kind=kind, options=options[kind])


def splits(kind: str, samples: int, held_out: int = 20) -> Splits:
    source = Words if kind in ("gpt", "lstm", "moe", "elmo") else Images
    return Splits(source(samples), validation=source(held_out, seed=1) if held_out else None)


def recipe(kind: str, **changes: Any) -> Recipe:
    """9 steps of 16 samples on 8 shards, in float32, without evaluation or checkpoints on the way: of 101 samples, an
    epoch with a short last batch, and two steps of the next."""
    start = Recipe(
        model=model(kind),
        optimizer=OptimizerSpec(name="adamw", lr=0.01),
        schedule=ScheduleSpec(kind="constant"),
        report=Reporting(evaluate_every=10**9, checkpoint_every=10**9, sample=False),
        batch=16,
        shards=8,
        precision="float32",
        steps=9,
    )
    return replace(start, **changes)
