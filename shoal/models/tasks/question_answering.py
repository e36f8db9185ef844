"""Extractive question answering: find the first and the last token of the answer."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.data.source import Batch
from shoal.models.tasks.cross_entropy import IGNORED, cross_entropy, mean


class QuestionAnswering:
    """Batch {"tokens", "mask", "types": [n, T], "start", "end": int [n]}: the model gives logits [n, T, 2].

    A sample's loss is the mean of the losses of its first and its last token; both -100 does not count. A window that
    does not hold the answer has start = end = 0. F1 and exact match of texts are in shoal.models.squad."""

    name = "question-answering"
    unit = "samples"
    best: tuple[str, Literal["min", "max"]] = ("accuracy", "max")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return _span_loss(_logits(model, batch), batch)

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        logits = _logits(model, batch)
        loss, count = _span_loss(logits, batch)
        start, end = logits.argmax(1).unbind(-1)
        starts, ends = start == batch["start"], end == batch["end"]
        return {
            "loss": loss.item(),
            "count": count,
            "correct_start": int(starts.sum()),
            "correct_end": int(ends.sum()),
            "correct": int((starts & ends).sum()),
        }

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            "loss": mean(sums, "loss"),
            "accuracy": mean(sums, "correct"),
            "start_accuracy": mean(sums, "correct_start"),
            "end_accuracy": mean(sums, "correct_end"),
        }


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch["tokens"], mask=batch.get("mask"), types=batch.get("types"))
    return logits


def _span_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    start, _ = cross_entropy(logits[..., 0], batch["start"])
    end, _ = cross_entropy(logits[..., 1], batch["end"])
    return (start + end) / 2, int((batch["start"] != IGNORED).sum())
