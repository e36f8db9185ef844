"""Parameters of a pipeline's chunk between hosts: whole while the chunk computes, and (ZeRO-3) slices at other times.

Micro-batches are under way in a chunk all at once, forward and backward by turns, so that its parameters are needed
from the first pass of a step to the last one. They come together and go together.
"""

from torch import Tensor

from shoal.comm.gathered_weights import GatheredWeights
from shoal.comm.slices import Piece


class StageWeights:
    """What `Sharded` calls Weights. ``releases``: between the last pass of a step and the first one of the next, what
    others own is not here; else all of it is, a little later than the update."""

    shared = False

    def __init__(self, weights: GatheredWeights, buckets: int, *, releases: bool) -> None:
        self.weights, self.parameters = weights, weights.parameters
        self._buckets, self._releases = range(buckets), releases
        self.readable = True

    def piece(self, piece: Piece) -> Tensor:
        return self.weights.piece(piece)

    def updated(self) -> None:
        """The own slices hold the new weights: what others own of them has to come in anew."""
        self.readable = False
        for bucket in self._buckets:
            (self.weights.release if self._releases else self.weights.stale)(bucket)
        if not self._releases:
            self._start()

    def _start(self) -> None:
        for bucket in self._buckets:
            self.weights.start(bucket)

    def arrive(self) -> None:
        """Until all is here. Called by all workers that share the chunk."""
        self._start()
        for bucket in self._buckets:
            self.weights.wait(bucket)
        self.readable = True

    def settle(self) -> None:
        self.arrive()

    def leave(self) -> None: ...

    def complete(self) -> None:
        """After the last pass of a step."""
        if self._releases:
            self.readable = False
            for bucket in self._buckets:
                self.weights.release(bucket)

    def count_anew(self) -> None:
        self.weights.count_anew()

    def most_bytes(self) -> int:
        return self.weights.most_bytes()

    def held_bytes(self) -> dict[str, int]:
        return self.weights.held_bytes()
