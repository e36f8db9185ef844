"""Which part of a GPT one process computes: some of its layers; of each, some heads and some of the hidden layer."""

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
    stages: int = 1  # of the model
    slices: int = 1  # of each layer
    stage: int = 0

    @property
    def first(self) -> bool:
        """It begins with the tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """It ends with the logits."""
        return self.stage == self.stages - 1

    def block_bytes(self, shape: Shape) -> int:
        """Of one block in its cache."""
        return shape.block_bytes() * len(self.layers) * len(self.heads) // (shape.layers * shape.heads)


def whole(shape: Shape) -> Part:
    return Part(range(shape.layers), range(shape.heads), range(shape.ffn), range(shape.vocab))


def parts(shape: Shape, stages: int, slices: int) -> dict[tuple[int, int], Part]:
    """Of each (stage, slice). Raises UserError when there is too little to split."""
    for axis, ways, what, count in (
        ("pipe", stages, "layers", shape.layers),
        ("tensor", slices, "heads", shape.heads),
        ("tensor", slices, "numbers in its hidden layers", shape.ffn),
    ):
        if ways > count:
            raise UserError(f"--mesh {axis}={ways}: the model has {count} {what}: use {axis}={count} at most.")
    cuts = [0, *_cuts(shape, stages), shape.layers]
    found = {}
    for stage in range(stages):
        for slice in range(slices):
            heads, ffn, vocab = (_share(n, slices, slice) for n in (shape.heads, shape.ffn, shape.vocab))
            layers = range(cuts[stage], cuts[stage + 1])
            found[stage, slice] = Part(layers, heads, ffn, vocab, stages, slices, stage)
    return found


def _share(units: int, ways: int, index: int) -> range:
    sizes = shares(units, ways)
    return range(sum(sizes[:index]), sum(sizes[: index + 1]))


def _cuts(shape: Shape, stages: int) -> tuple[int, ...]:
    """The layers at which stages begin, by the numbers that a row is multiplied with; the last has the head too."""
    layer = float(4 * shape.width * shape.width + 2 * shape.width * shape.ffn)
    costs = [layer] * (shape.layers - 1) + [layer + shape.width * shape.vocab]
    return balance([Piece(str(number), cost, 0, 0, 0) for number, cost in enumerate(costs)], stages)
