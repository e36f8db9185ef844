"""What a model is trained for: the loss as a sum and a count, and additive figures for evaluation."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.data.source import Batch


class Task(Protocol):
    """Losses come as (sum, count), never as a mean: the mean over the global batch is taken once, after the tree.

    The caller sets the model to training or evaluation mode, and chooses the autocast."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str:
        """What the loss is counted in: "samples" or "tokens"."""

    @property
    def best(self) -> tuple[str, Literal["min", "max"]]:
        """The figure of ``summarise`` that names the best checkpoint, and which way is better."""

    def loss(self, model: "nn.Module", batch: "Batch") -> tuple["Tensor", int]:
        """(scalar sum of the losses, number of targets). Randomness comes from torch's default generator only."""

    def measure(self, model: "nn.Module", batch: "Batch") -> dict[str, float]:
        """Sums over the batch that add up over batches: {"loss": ..., "count": ..., "correct": ...}. No gradient."""

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Figures from the added sums: {"loss": ..., "accuracy": ..., "perplexity": ...}."""
