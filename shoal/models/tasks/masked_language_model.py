"""Masked language modelling: restore hidden tokens (Devlin et al., 2019, section 3.1)."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.data.source import Batch
from shoal.models.tasks.cross_entropy import cross_entropy, mean, measure_choice
from shoal.models.tasks.language_model import perplexity

CHOSEN = 0.15  # share of the tokens that become targets
HIDDEN = 0.8  # share of those that are replaced by the mask token
SWAPPED = 0.1  # share of those that are replaced by a random token; the rest stays


@dataclass(frozen=True)
class Noise:
    """What decides the masking, for tokens [n, T]."""

    choice: Tensor  # float [n, T] in [0, 1): a target where below CHOSEN
    action: Tensor  # float [n, T] in [0, 1): hidden, swapped or left
    tokens: Tensor  # int [n, T]: what a swapped token becomes


def draw_noise(shape: tuple[int, int], vocab: int, generator: torch.Generator | None = None) -> Noise:
    """Drawn on the CPU, from torch's default generator unless another is given: equal on every device."""
    choice, action = torch.rand(2, *shape, generator=generator)
    return Noise(choice, action, torch.randint(vocab, shape, generator=generator))


def noise_of(tokens: Tensor, vocab: int) -> Noise:
    """Noise that is a function of each row's tokens alone, so that an evaluation does not depend on its batches."""
    rows = []
    for row in tokens.cpu().long():
        generator = torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes()))
        rows.append(draw_noise((1, len(row)), vocab, generator))
    parts = zip(*((noise.choice, noise.action, noise.tokens) for noise in rows), strict=True)
    return Noise(*(torch.cat(part) for part in parts))


def mask_tokens(tokens: Tensor, may_choose: Tensor, noise: Noise, mask_token: int) -> tuple[Tensor, Tensor]:
    """(tokens as the model sees them [n, T], where the targets are bool [n, T])."""
    chosen = (noise.choice.to(tokens.device) < CHOSEN) & may_choose
    action = noise.action.to(tokens.device)
    seen = tokens.masked_fill(chosen & (action < HIDDEN), mask_token)
    swapped = chosen & (action >= HIDDEN) & (action < HIDDEN + SWAPPED)
    return torch.where(swapped, noise.tokens.to(tokens), seen), chosen


@dataclass(frozen=True)
class MaskedLanguageModel:
    """Batch {"tokens": [n, T]} and maybe "mask" and "types": ``model(tokens, mask=, types=, at=)`` gives logits
    [k, vocab] at the k places where ``at`` is true. Padding and special tokens are never targets."""

    vocab: int  # swapped tokens are below this
    mask_token: int
    special: tuple[int, ...] = ()  # never chosen: the tokens that begin, separate and end
    context: int = 0  # tokens of a sample that the model sees; 0: all
    name: str = "masked-language-model"
    unit: str = "tokens"
    best: tuple[str, Literal["min", "max"]] = ("loss", "min")

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return cross_entropy(*self._restore(model, batch, training=True))

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return measure_choice(*self._restore(model, batch, training=False))

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = mean(sums, "loss")
        return {"loss": loss, "perplexity": perplexity(loss), "accuracy": mean(sums, "correct")}

    def _tokens(self, batch: Batch) -> Tensor:
        return batch["tokens"][:, : self.context or None].long()

    def hide(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor | None], Tensor, Tensor]:
        """The tokens that the model sees, mask and types; the tokens as they were, and where the targets are."""
        tokens = self._tokens(batch)
        length = tokens.shape[1]
        mask, types = (batch[name][:, :length] if name in batch else None for name in ("mask", "types"))
        may_choose = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        for token in self.special:
            may_choose = may_choose & (tokens != token)
        seen, chosen = mask_tokens(tokens, may_choose, noise, self.mask_token)
        return seen, {"mask": mask, "types": types}, tokens, chosen

    def noise(self, batch: Batch, *, training: bool) -> Noise:
        """Drawn anew in training; in an evaluation a function of the tokens."""
        tokens = self._tokens(batch)
        return draw_noise((tokens.shape[0], tokens.shape[1]), self.vocab) if training else noise_of(tokens, self.vocab)

    def _restore(self, model: nn.Module, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        seen, rest, tokens, chosen = self.hide(batch, self.noise(batch, training=training))
        return model(seen, **rest, at=chosen), tokens[chosen]
