"""Cross-entropy as a sum and a count, in float32 whatever the model computes in."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that does not count


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """Logits [..., classes] and targets int [...] -> (scalar sum of the losses in nats, number of targets).

    Float32 logits are used as they are; only lower precisions are copied."""
    target = target.reshape(-1).long()
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), target, ignore_index=IGNORED, reduction="sum")
    return loss, int((target != IGNORED).sum())


def measure_choice(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Additive sums of a choice among classes: loss, count and correct. Targets of -100 do not count."""
    loss, count = cross_entropy(logits, target)
    return {"loss": loss.item(), "count": count, "correct": int((logits.argmax(-1) == target).sum())}


def mean(sums: Mapping[str, float], name: str) -> float:
    """The mean of one sum over the count; NaN when nothing counted."""
    return sums[name] / sums["count"] if sums["count"] else float("nan")
