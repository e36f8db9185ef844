"""Which rows of an image the workers send each other, so that each can compute its band of a layer's outputs."""

from dataclasses import dataclass
from functools import cached_property

from shoal.parallel.layout.split import Run, Split


@dataclass(frozen=True)
class Window:
    """A layer with this kernel over rows: output row i is made of the input rows i * stride - padding and on."""

    kernel: int  # rows that one output row is made of, with the gaps of a dilation
    stride: int
    padding: int
    inputs: Split  # rows that come in
    outputs: Split  # rows that go out

    @cached_property
    def reach(self) -> tuple[Run, ...]:
        """The input rows that each worker's outputs are made of, padding included: they may begin below 0."""
        runs = [runs[0] for runs in self.outputs.kept]
        return tuple(
            (first * self.stride - self.padding, (last - 1) * self.stride - self.padding + self.kernel)
            for first, last in runs
        )

    @cached_property
    def needed(self) -> tuple[Run, ...]:
        """Those of them that exist."""
        return tuple((max(0, first), min(self.inputs.full, last)) for first, last in self.reach)

    def padded(self, rank: int) -> tuple[int, int]:
        """Rows of padding above and below a worker's rows."""
        (first, last), (low, high) = self.reach[rank], self.needed[rank]
        return low - first, last - high

    def shared(self, owner: int, needer: int) -> Run:
        """The rows of ``owner`` that ``needer`` needs, counted from the owner's first; empty ones have equal ends."""
        begin, end = self.inputs.kept[owner][0]
        low, high = self.needed[needer]
        first, last = max(begin, low), min(end, high)
        return (first - begin, last - begin) if first < last else (0, 0)

    @property
    def sent(self) -> int:
        """Rows that all workers send to others."""
        ways = range(len(self.inputs.kept))
        return sum(b - a for o in ways for n in ways if o != n for a, b in (self.shared(o, n),))
