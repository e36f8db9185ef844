"""Where to cut so that the slowest stage is as fast as can be. Pure: numbers in, numbers out."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from shoal.errors import UserError
from shoal.parallel.partition.pieces import Piece

SLACK = 0.02  # a stage may take this share longer than the best cut's slowest if fewer bytes then cross the cuts


def balance(
    pieces: Sequence[Piece],
    count: int,
    *,
    speeds: Sequence[float] | None = None,
    workers: Sequence[int] | None = None,
    capacity_bytes: Sequence[float] | None = None,
    states: float = 1.0,
    in_flight: Sequence[int] | None = None,
    slack: float = SLACK,
) -> tuple[int, ...]:
    """The pieces at which chunks 1, 2, ... begin, so that the largest seconds of a chunk / its device's speed is least.

    For each chunk: ``speeds`` of its device (relative; default all equal), ``capacity_bytes`` of its device, and
    ``in_flight``, the micro-batches whose activations it holds at once (default 1). A chunk needs ``states`` x its
    parameters' bytes and the activations. Exact, by dynamic programming; of all cuts whose slowest chunk takes at most
    ``slack`` longer, the one that sends the fewest bytes.

    ``workers`` says which worker holds each chunk when they hold several: then the largest sum of a worker is what
    counts. That is a local search from the exact cut into equal chunks: it moves one cut at a time while that helps.
    ``capacity_bytes`` is then what a worker has for each of its chunks.

    Raises UserError when there are fewer pieces than chunks, and when the memory does not suffice."""
    problem = _Problem(pieces, count, speeds, capacity_bytes, states, in_flight)
    cuts = problem.cheapest(problem.bottleneck() * (1 + slack))
    return cuts if workers is None or len(set(workers)) == len(workers) else problem.moved(cuts, workers)


def slowest(pieces: Sequence[Piece], cuts: Sequence[int], speeds: Sequence[float] | None = None) -> float:
    """Seconds of the slowest chunk."""
    bounds = (0, *cuts, len(pieces))
    paces = speeds or [1.0] * (len(cuts) + 1)
    chunks = zip(pairwise(bounds), paces, strict=True)
    return max(sum(piece.seconds for piece in pieces[a:b]) / pace for (a, b), pace in chunks)


class _Problem:
    def __init__(
        self,
        pieces: Sequence[Piece],
        count: int,
        speeds: Sequence[float] | None,
        capacity_bytes: Sequence[float] | None,
        states: float,
        in_flight: Sequence[int] | None,
    ) -> None:
        self.pieces, self.count, self.size, self.states = pieces, count, len(pieces), states
        if count < 1:
            raise UserError(f"a model is cut into at least 1 chunk, not {count}.")
        if self.size < count:
            raise UserError(
                f"the model has {self.size} pieces, too few for {count} chunks: take at most {self.size} "
                f"(pipeline workers x chunks of each)."
            )
        self.speeds = _each("speeds", speeds, 1.0, count)
        self.capacity = _each("capacity_bytes", capacity_bytes, math.inf, count)
        self.in_flight = _each("in_flight", in_flight, 1, count)
        self.seconds = [0.0, *accumulate(piece.seconds for piece in pieces)]
        self.parameters = [0, *accumulate(piece.parameter_bytes for piece in pieces)]
        self.activations = [0, *accumulate(piece.activation_bytes for piece in pieces)]

    def bottleneck(self) -> float:
        """Seconds of the slowest chunk of the best cut."""
        best = [0.0, *[math.inf] * self.size]  # [j]: of the first j pieces over the chunks so far
        for chunk in range(self.count):
            before, best = best, [math.inf] * (self.size + 1)
            for last in self._ends(chunk):
                for first in range(last - 1, chunk - 1, -1):
                    takes = self._takes(chunk, first, last)
                    if takes >= best[last] or self._needs(chunk, first, last) > self.capacity[chunk]:
                        break  # and the more so with still more pieces
                    best[last] = min(best[last], max(takes, before[first]))
        if best[self.size] == math.inf:
            raise UserError(
                f"no cut into {self.count} chunks fits the memory: the largest piece, {self._largest()}, "
                f"the model {self._needs(0, 0, self.size):,.0f}, and they have {sum(self.capacity):,.0f} bytes: "
                f"use more chunks, fewer micro-batches in flight, or recomputation."
            )
        return best[self.size]

    def cheapest(self, limit: float) -> tuple[int, ...]:
        """The cuts with the fewest bytes across them of all whose chunks take at most ``limit`` seconds."""
        best: list[tuple[float, float]] = [(0.0, 0.0), *[(math.inf, math.inf)] * self.size]  # (bytes sent, slowest)
        begins: list[list[int]] = []
        for chunk in range(self.count):
            before, best = best, [(math.inf, math.inf)] * (self.size + 1)
            begins.append([0] * (self.size + 1))
            for last in self._ends(chunk):
                for first in range(last - 1, chunk - 1, -1):
                    takes = self._takes(chunk, first, last)
                    if takes > limit or self._needs(chunk, first, last) > self.capacity[chunk]:
                        break
                    sent = before[first][0] + (self.pieces[first - 1].output_bytes if first else 0)
                    found = (sent, max(takes, before[first][1]))
                    if found < best[last]:
                        best[last], begins[chunk][last] = found, first
        cuts, last = [], self.size
        for chunk in range(self.count - 1, 0, -1):
            last = begins[chunk][last]
            cuts.append(last)
        return tuple(reversed(cuts))

    def moved(self, cuts: tuple[int, ...], workers: Sequence[int]) -> tuple[int, ...]:
        """Cuts moved one at a time as long as the largest sum of a worker, or the next largest, gets less."""
        best = self._loads(cuts, workers)
        improved = True
        while improved:
            improved = False
            for number in range(len(cuts)):
                low = cuts[number - 1] + 1 if number else 1
                high = cuts[number + 1] if number + 1 < len(cuts) else self.size
                for place in range(low, high):
                    tried = (*cuts[:number], place, *cuts[number + 1 :])
                    loads = self._loads(tried, workers)
                    if loads < best:
                        cuts, best, improved = tried, loads, True
        return cuts

    def _loads(self, cuts: tuple[int, ...], workers: Sequence[int]) -> list[float]:
        """Seconds of the workers, the slowest first; infinite where a chunk does not fit its device."""
        loads = dict.fromkeys(workers, 0.0)
        for chunk, (first, last) in enumerate(pairwise((0, *cuts, self.size))):
            fits = self._needs(chunk, first, last) <= self.capacity[chunk]
            loads[workers[chunk]] += self._takes(chunk, first, last) if fits else math.inf
        return sorted(loads.values(), reverse=True)

    def _ends(self, chunk: int) -> range:
        """Where a chunk can end, so that every chunk before and after it has a piece."""
        return range(chunk + 1, self.size - (self.count - 1 - chunk) + 1)

    def _takes(self, chunk: int, first: int, last: int) -> float:
        return (self.seconds[last] - self.seconds[first]) / self.speeds[chunk]

    def _needs(self, chunk: int, first: int, last: int) -> float:
        activations = self.activations[last] - self.activations[first]
        return self.states * (self.parameters[last] - self.parameters[first]) + self.in_flight[chunk] * activations

    def _largest(self) -> str:
        size, name = max((self._needs(0, i, i + 1), piece.name) for i, piece in enumerate(self.pieces))
        return f"{name!r}, needs {size:,.0f} bytes"


def _each(what: str, given: Sequence[float] | None, default: float, count: int) -> Sequence[float]:
    """One number above 0 for each chunk."""
    numbers = [default] * count if given is None else list(given)
    if len(numbers) != count or min(numbers) <= 0:
        raise UserError(f"{what} = {numbers}: give one number above 0 for each of the {count} chunks.")
    return numbers
