"""A step as the stages of a pipeline go through it: batches, random streams and gradients of each micro-batch."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shoal.data.loading import Prefetcher
from shoal.data.source import Batch
from shoal.train.reduction import Reduction
from shoal.train.step_guard import StepGuard


class Owner(Protocol):
    """The step that this is a part of."""

    @property
    def nothing(self) -> Batch: ...
    def enter_stream(self, shard: int, micro: int) -> None: ...
    def to_device(self, batch: Batch) -> Batch: ...

    guard: StepGuard


class StageWork:
    """What the engine asks for; its micro-batches are the replica's, counted through all of its shards."""

    def __init__(
        self,
        step: Owner,
        reduction: Reduction,
        places: Sequence[tuple[int, int] | None],
        passes: Sequence[int],
        batches: Prefetcher[tuple[int, int, int]],
    ) -> None:
        """``places``: (shard, micro-batch in it), of each micro-batch, None where it has no samples and comes after all
        that have; ``passes``: micro-batches of each shard."""
        self._step, self._reduction, self._places, self._passes = step, reduction, places, passes
        self._batches = batches
        self._fetched: dict[int, Batch] = {}
        self._next = 0
        self._asked: dict[int, int] = {}
        assert reduction.held.pipeline is not None
        self._readers = reduction.held.pipeline.readers
        self.loading_s = 0.0

    def batch(self, micro_batch: int) -> Batch:
        """Batches come in order; one that several chunks read is kept for the last of them."""
        if self._places[micro_batch] is None:
            return self._step.nothing
        begun = time.perf_counter()
        while self._next <= micro_batch:
            _, found = next(self._batches)
            self._fetched[self._next] = self._step.to_device(found)
            self._next += 1
        self.loading_s += time.perf_counter() - begun
        self._asked[micro_batch] = self._asked.get(micro_batch, 0) + 1
        if self._asked[micro_batch] == self._readers:
            return self._fetched.pop(micro_batch)
        return self._fetched[micro_batch]

    def enter_stream(self, micro_batch: int) -> None:
        if place := self._places[micro_batch]:
            self._step.enter_stream(*place)

    def enter(self, chunk: int, micro_batch: int) -> None:
        if place := self._places[micro_batch]:
            self._reduction.enter_leaf(place[0], chunk)

    def left(self, chunk: int, micro_batch: int, made: Any) -> None:
        place = self._places[micro_batch]
        if place:
            self._step.guard.handed_on(made, chunk, *place)
        if place and place[1] == self._passes[place[0]] - 1:
            self._reduction.leave_leaf(chunk)

    def counted(self, micro_batch: int, value: float, count: float) -> None:
        if place := self._places[micro_batch]:
            self._step.guard.loss(value, *place)

    def backward(self, chunk: int, micro_batch: int, run: Callable[[], None], value: float, count: float) -> None:
        if place := self._places[micro_batch]:
            self._reduction.backward(place[0], run, value, count, waited_s=self.loading_s, chunk=chunk)
        else:
            self._reduction.backward_of_others(run, chunk)
