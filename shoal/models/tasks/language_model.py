"""Language modelling: predict each next token, or each next and each previous one."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.data.source import Batch
from shoal.models.tasks.cross_entropy import IGNORED, cross_entropy, mean, measure_choice


def perplexity(loss: float) -> float:
    """exp of the mean loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class LanguageModel:
    """Batch {"tokens": [n, T + 1]}: ``model(tokens[:, :-1])`` gives logits [n, T, vocab] of the next tokens.

    An optional "mask" [n, T + 1] is 0 where a token is padding, which is never a target."""

    name = "language-model"
    unit = "tokens"
    best: tuple[str, Literal["min", "max"]] = ("loss", "min")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return cross_entropy(model(batch["tokens"][:, :-1]), real_tokens(batch)[:, 1:])

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return measure_choice(model(batch["tokens"][:, :-1]), real_tokens(batch)[:, 1:])

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = mean(sums, "loss")
        return {"loss": loss, "perplexity": perplexity(loss), "accuracy": mean(sums, "correct")}


class BidirectionalLanguageModel(LanguageModel):
    """Batch {"tokens": [n, T + 1]}: the model gives two logits [n, T, vocab], of the tokens after each of the first T
    and of the tokens before each of the last T; both losses are added (Peters et al., 2018, section 3.1)."""

    name = "bidirectional-language-model"

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        forward, backward = model(batch["tokens"])
        target = real_tokens(batch)
        after, counted_after = cross_entropy(forward, target[:, 1:])
        before, counted_before = cross_entropy(backward, target[:, :-1])
        return after + before, counted_after + counted_before

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        forward, backward = model(batch["tokens"])
        target = real_tokens(batch)
        after = measure_choice(forward, target[:, 1:])
        before = measure_choice(backward, target[:, :-1])
        return {name: after[name] + before[name] for name in after}


def real_tokens(batch: Batch) -> Tensor:
    """The tokens, with padding set to the target that does not count."""
    tokens = batch["tokens"].long()
    return tokens.masked_fill(~batch["mask"].bool(), IGNORED) if "mask" in batch else tokens
