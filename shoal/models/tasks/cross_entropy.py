"""Cross-entropy as a sum and a count, in at least float32 whatever the model computes in."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that does not count


class PartOfLogits(ABC):
    """Logits [..., classes] of which this worker has some classes only; a loss never brings the rest together."""

    @abstractmethod
    def cross_entropy(self, target: Tensor) -> Tensor:
        """As of the whole logits and int [...]: the scalar sum of the losses in nats."""

    @abstractmethod
    def whole(self) -> Tensor:
        """The logits [..., V], without a history: all workers that have a part of them call it."""

    @abstractmethod
    def argmax(self) -> Tensor:
        """int [...]: as of the whole logits."""


def cross_entropy(logits: Tensor | PartOfLogits, target: Tensor) -> tuple[Tensor, int]:
    """Logits [..., classes] and targets int [...] -> (scalar sum of the losses in nats, number of targets).

    Float32 logits are used as they are; only lower precisions are copied."""
    target = target.reshape(-1).long()
    count = int((target != IGNORED).sum())
    if isinstance(logits, PartOfLogits):
        return logits.cross_entropy(target), count
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(wide.reshape(-1, logits.shape[-1]), target, ignore_index=IGNORED, reduction="sum")
    return loss, count


def measure_choice(logits: Tensor | PartOfLogits, target: Tensor) -> dict[str, float]:
    """Additive sums of a choice among classes: loss, count and correct. Targets of -100 do not count."""
    loss, count = cross_entropy(logits, target)
    chosen = logits.argmax() if isinstance(logits, PartOfLogits) else logits.argmax(-1)
    return {"loss": loss.item(), "count": count, "correct": int((chosen == target).sum())}


def mean(sums: Mapping[str, float], name: str) -> float:
    """The mean of one sum over the count; NaN when nothing counted."""
    return sums[name] / sums["count"] if sums["count"] else float("nan")
