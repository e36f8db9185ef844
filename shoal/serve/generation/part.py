"""Which part of a GPT one process computes: some of its layers; of each, some heads and some of the hidden layer, or
some of the experts."""

from dataclasses import dataclass

from shoal.errors import UserError
from shoal.parallel.layout.split import shares
from shoal.parallel.partition.balance import balance
from shoal.parallel.partition.pieces import Piece
from shoal.serve.generation.step import Shape


@dataclass(frozen=True)
class Part:
    layers: range
    heads: range
    ffn: range
    vocab: range
    experts: range  # empty: the model has none
    stages: int = 1  # of the model
    slices: int = 1  # of each stage: along axis tensor or expert
    stage: int = 0

    @property
    def first(self) -> bool:
        """It begins with the tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """It ends with the logits."""
        return self.stage == self.stages - 1

    def sliced(self, shape: Shape) -> bool:
        """Its heads and hidden layers are slices, whose answers are added up."""
        return len(self.heads) < shape.heads

    def block_bytes(self, shape: Shape) -> int:
        """Of one block in its cache."""
        return shape.block_bytes() * len(self.layers) * len(self.heads) // (shape.layers * shape.heads)


def whole(shape: Shape) -> Part:
    return Part(range(shape.layers), range(shape.heads), range(shape.ffn), range(shape.vocab), range(shape.experts))


def parts(shape: Shape, stages: int, tensor: int, expert: int = 1) -> dict[tuple[int, int], Part]:
    """Of each (stage, slice), which is one of ``tensor`` or of ``expert``. Raises UserError when there is too little to
    split.

    Along ``expert`` every process has all heads, and its part of the experts and of the vocabulary: no sum is cut."""
    for axis, ways, what, count in (
        ("pipe", stages, "layers", shape.layers),
        ("tensor", tensor, "heads", shape.heads),
        ("tensor", tensor, "numbers in its hidden layers", shape.ffn),
        ("expert", expert, "experts", shape.experts or 1),
    ):
        if axis == "expert" and ways > 1 and not shape.experts:
            raise UserError(f"--mesh expert={ways}: the model has no experts: leave expert out, or use tensor={ways}.")
        if ways > count:
            raise UserError(f"--mesh {axis}={ways}: the model has {count} {what}: use {axis}={count} at most.")
    cuts = [0, *_cuts(shape, stages), shape.layers]
    found = {}
    slices = tensor * expert
    for stage in range(stages):
        for slice in range(slices):
            heads, ffn = (_share(n, tensor, slice % tensor) for n in (shape.heads, shape.ffn))
            vocab, experts = _share(shape.vocab, slices, slice), _share(shape.experts, expert, slice // tensor)
            layers = range(cuts[stage], cuts[stage + 1])
            found[stage, slice] = Part(layers, heads, ffn, vocab, experts, stages, slices, stage)
    return found


def _share(units: int, ways: int, index: int) -> range:
    sizes = shares(units, ways)
    return range(sum(sizes[:index]), sum(sizes[: index + 1]))


def _cuts(shape: Shape, stages: int) -> tuple[int, ...]:
    """The layers at which stages begin, by the numbers that a row is multiplied with; the last has the head too."""
    layer = shape.products_of_layers() / shape.layers
    costs = [layer] * (shape.layers - 1) + [layer + shape.width * shape.vocab]
    return balance([Piece(str(number), cost, 0, 0, 0) for number, cost in enumerate(costs)], stages)
