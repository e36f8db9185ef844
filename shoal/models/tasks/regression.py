"""Regression: the mean squared error of numbers."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.data.source import Batch
from shoal.models.tasks.cross_entropy import mean


class Regression:
    """Batch {"input": [n, ...], "target": float [n] or [n, outputs]}; the model gives [n, outputs].

    A sample's loss is its squared error, averaged over the outputs."""

    name = "regression"
    unit = "samples"
    best: tuple[str, Literal["min", "max"]] = ("loss", "min")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        target = batch["target"].float().reshape(len(batch["target"]), -1)
        output = model(batch["input"]).float().reshape(target.shape)
        return F.mse_loss(output, target, reduction="sum") / target.shape[1], len(target)

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        loss, count = self.loss(model, batch)
        return {"loss": loss.item(), "count": count}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = mean(sums, "loss")
        return {"loss": loss, "mse": loss, "rmse": loss**0.5}
