"""Layers whose weight is cut: Linear, Conv2d, Embedding, and the logits."""

import torch.nn.functional as F
from torch import Tensor, nn

from shoal.comm.tensors import Collectives
from shoal.models.convolution import Conv2d
from shoal.models.ends import Logits
from shoal.models.resnet import PaddedShortcut
from shoal.models.tasks.cross_entropy import PartOfLogits
from shoal.parallel.layout.passage import Passage
from shoal.parallel.layout.split import Split
from shoal.parallel.layout.treatment import Weighted
from shoal.parallel.tensor.adopting import adopt
from shoal.parallel.tensor.crossing import Slices, cross, sum_gradients
from shoal.parallel.tensor.vocabulary import VocabularyPart


class Doors:
    """What a layer does with what comes in and what goes out."""

    def __init__(self, treatment: Weighted, collectives: Collectives, slices: Slices, features: int) -> None:
        """``features``: the dim of features in what comes in and goes out."""
        self.treatment, self.collectives, self.slices, self.features = treatment, collectives, slices, features
        self.flow = treatment.flow

    def _split(self, passage: Passage, split: Split | None) -> Split | None:
        if passage.along == "positions":
            return self.slices.split()
        return split.along(self.features) if split is not None else None

    def enter(self, x: Tensor) -> Tensor:
        passage = self.flow.arrival
        return cross(x, passage, self.collectives, self._split(passage, self.treatment.inputs))

    def leave(self, y: Tensor) -> Tensor:
        passage = self.flow.departure
        return cross(y, passage, self.collectives, self._split(passage, self.treatment.outputs))

    def parameters(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight, bias to add before the output leaves, bias to add to what has left): one of them at most."""
        if self.flow.partial:
            summed, before = sum_gradients(self.collectives, weight, bias)
            assert summed is not None
            return summed, before, None
        if self.flow.cut != "in" or bias is None:
            return weight, bias, None
        if self.flow.leaves == "positions":
            (bias,) = sum_gradients(self.collectives, bias)
        elif self.treatment.outputs is not None and len(bias) == self.treatment.outputs.full:
            bias = cross(
                bias, Passage("take", "all-gather", "features"), self.collectives, self.treatment.outputs.along(0)
            )
        return weight, None, bias


class SplitLinear(nn.Linear):
    def __init__(self, whole: nn.Linear, doors: Doors) -> None:
        adopt(self, whole)
        self.out_features, self.in_features = whole.weight.shape  # of this worker
        self.doors = doors

    def forward(self, input: Tensor) -> Tensor:
        weight, before, after = self.doors.parameters(self.weight, self.bias)
        y = self.doors.leave(F.linear(self.doors.enter(input), weight, before))
        return y if after is None else y + after.to(y.dtype)


class SplitConv2d(Conv2d):
    def __init__(self, whole: nn.Conv2d, doors: Doors) -> None:
        adopt(self, whole)
        self.out_channels, self.in_channels = whole.weight.shape[:2]
        self.doors = doors

    def forward(self, input: Tensor) -> Tensor:
        weight, before, after = self.doors.parameters(self.weight, self.bias)
        y = self.doors.leave(self.convolve(self.doors.enter(input), weight, before))
        return y if after is None else y + after.to(y.dtype).view(-1, 1, 1)


class SplitEmbedding(nn.Embedding):
    def __init__(self, whole: nn.Embedding, doors: Doors) -> None:
        adopt(self, whole)
        self.num_embeddings, self.embedding_dim = whole.weight.shape
        self.doors = doors

    def forward(self, input: Tensor) -> Tensor:
        doors, flow = self.doors, self.doors.flow
        if flow.leaves == "positions":
            doors.slices.enter(input.shape[1])
        rows = doors.treatment.inputs
        if flow.cut != "in" or rows is None:
            return doors.leave(F.embedding(input, self.weight))
        first = rows.start(doors.collectives.rank)
        local = input - first
        elsewhere = (local < 0) | (local >= len(self.weight))
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return doors.leave(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class SplitShortcut(PaddedShortcut):
    def __init__(self, whole: PaddedShortcut, doors: Doors) -> None:
        adopt(self, whole)
        self.doors = doors

    def forward(self, x: Tensor) -> Tensor:
        return self.doors.leave(super().forward(self.doors.enter(x)))


class SplitLogits(Logits):
    """Gives the logits whole, or this worker's part of them for a cross-entropy in parts."""

    def __init__(self, whole: Logits, doors: Doors) -> None:
        adopt(self, whole)
        self.doors = doors

    def forward(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | PartOfLogits:  # type: ignore[override]
        doors = self.doors
        weight, before, after = doors.parameters(weight, bias)
        logits = doors.leave(F.linear(doors.enter(states), weight, before))
        if after is not None:
            logits = logits + after.to(logits.dtype)
        if doors.flow.leaves == "features":
            assert doors.treatment.outputs is not None
            return VocabularyPart(logits, doors.treatment.outputs, doors.collectives)
        return logits
