"""Classification of inputs or of token sequences."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.data.source import Batch
from shoal.models.tasks.cross_entropy import cross_entropy, mean, measure_choice


class Classification:
    """Batch {"input": [n, ...], "target": int [n]}, or {"tokens": [n, T], "mask": [n, T], "target"} and maybe "types".

    The model gives logits [n, classes]; a target of -100 does not count."""

    name = "classification"
    unit = "samples"
    best: tuple[str, Literal["min", "max"]] = ("accuracy", "max")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return cross_entropy(_logits(model, batch), batch["target"])

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return measure_choice(_logits(model, batch), batch["target"])

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": mean(sums, "loss"), "accuracy": mean(sums, "correct")}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    if "tokens" in batch:
        logits: Tensor = model(batch["tokens"], mask=batch.get("mask"), types=batch.get("types"))
    else:
        logits = model(batch["input"])
    return logits
