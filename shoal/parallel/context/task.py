"""A task over split sequences: each worker counts the loss of its own part, and their sum is the whole loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.data.source import Batch
from shoal.errors import UserError
from shoal.models.task import Task
from shoal.models.tasks.cross_entropy import cross_entropy, measure_choice
from shoal.models.tasks.language_model import LanguageModel, real_tokens
from shoal.models.tasks.masked_language_model import MaskedLanguageModel
from shoal.parallel.context.ring import Ring

ONE_ANSWER = ("classification", "question-answering")  # a few numbers a sequence, which one worker compares


@dataclass(frozen=True)
class SplitTask:
    """The task of a model that `split_sequence` has changed, called by all workers of the ring with whole batches.

    Losses, counts and measures are partial sums over the ring. Raises UserError for a task whose loss nobody knows how
    to split."""

    whole: Task
    ring: Ring

    def __post_init__(self) -> None:
        known = isinstance(self.whole, MaskedLanguageModel) or type(self.whole) is LanguageModel
        if not known and self.whole.name not in ONE_ANSWER:
            raise UserError(
                f"task {self.whole.name!r} cannot split its sequences over mesh axis 'context': "
                f"language-model, masked-language-model, classification and question-answering can."
            )

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def unit(self) -> str:
        return self.whole.unit

    @property
    def best(self) -> tuple[str, Literal["min", "max"]]:
        return self.whole.best

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        if self.whole.name in ONE_ANSWER:
            total, count = self.whole.loss(model, batch)
            return (total, count) if self.ring.rank == 0 else (total * 0.0, 0)
        return cross_entropy(*self._choices(model, batch, training=True))

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        if self.whole.name in ONE_ANSWER:
            sums = self.whole.measure(model, batch)
            return sums if self.ring.rank == 0 else dict.fromkeys(sums, 0.0)
        return measure_choice(*self._choices(model, batch, training=False))

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return self.whole.summarise(sums)

    def _choices(self, model: nn.Module, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
        """Logits and targets of own places."""
        if isinstance(self.whole, MaskedLanguageModel):
            seen, rest, tokens, chosen = self.whole.hide(batch, self.whole.noise(batch, training=training))
            logits = model(seen, **rest, at=chosen)
            return logits, self.ring.own(tokens)[self.ring.own(chosen)]
        logits = model(batch["tokens"][:, :-1])
        return logits, self.ring.own(real_tokens(batch)[:, 1:])
