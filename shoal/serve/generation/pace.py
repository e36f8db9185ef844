"""How many rows of prompts a step may take along without making those who wait for their next token wait too long."""

from dataclasses import dataclass

from shoal.serve.generation.step import Shape

# What reading a float32 weight costs, in multiplications with it: 27 GB/s against 106 GFLOP/s, of one core of the
# machine of docs/figures.md. It only says how prompts are cut: no result depends on it.
READ_IN_ROWS = 8.0


@dataclass(frozen=True)
class Pace:
    """The work of a step in units of one row of a prompt, whose logits nobody wants."""

    of_step: float  # whatever the rows: reading the weights
    of_decode: float  # a row whose logits are wanted
    stretch: float = 1.45  # a step with prompts takes at most so many times as long as it would without
    most: int = 512  # rows of prompts in a step where nobody waits for a next token

    def prompt_rows(self, decodes: int) -> int:
        """At least 1: a prompt always comes forward."""
        if not decodes:
            return self.most
        room = (self.stretch - 1) * (self.of_step + decodes * self.of_decode)
        return max(1, min(self.most, int(room)))


def pace_of(shape: Shape, half: bool, stretch: float, most: int) -> Pace:
    row, head = shape.products_of_layers(), shape.vocab * shape.width
    read = READ_IN_ROWS * (shape.parameters_of_layers() + head) / row
    return Pace(read / (2 if half else 1), (row + head) / row, stretch, most)
