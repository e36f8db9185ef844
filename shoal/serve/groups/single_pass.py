"""The engine of models that answer with one forward pass, in the leader of a group: several batches are under way."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from shoal.recipe.plan import Plan
from shoal.serve.batching import Batch, Batcher, padded
from shoal.serve.engine import Begun, FromEngine, Request, Tell
from shoal.serve.groups.mesh import several_hosts
from shoal.serve.groups.model import SplitModel
from shoal.serve.groups.seat import Seat
from shoal.serve.groups.stage_pass import Made, StagedForward, StagePass, follow_leader
from shoal.serve.payloads import Inputs
from shoal.serve.single_pass import BatchEngine, results


@dataclass(frozen=True)
class _UnderWay:
    batch: Batch
    requests: list[Request]
    inputs: list[Inputs]
    begun: float  # when it entered the first stage
    here_s: float  # what the first stage took


class StagedSinglePass(BatchEngine):
    """See shoal.serve.engine.GroupEngine. A batch enters the next stage while the one after it enters the first."""

    def __init__(
        self, staged: StagedForward, pad: int, batcher: Batcher, context: int, tell: Tell, invariant: bool = False
    ) -> None:
        super().__init__(pad, batcher, context, tell, invariant)
        self._staged = staged
        self.sockets = staged.sockets
        self._under_way: deque[_UnderWay] = deque()
        self._again: deque[Batch] = deque()  # requests of a batch that failed, each alone

    def next_at(self, now: float) -> float | None:
        if self._has_room():
            return now if self._again else super().next_at(now)
        return self._figures_at() if self._untold else None

    def _has_room(self) -> bool:
        return self._staged.room(full=not self._again and self._batcher.rows >= self._batcher.most_rows)

    def hear(self) -> None:
        """Tells of the batches that have come out of the last stage."""
        told = False
        while (made := self._staged.finished()) is not None:
            self._tell(self._ended(self._under_way.popleft(), made))
            told = True
        if told:
            self._tell([self._begun()])
            self._rest()

    def work(self, now: float) -> None:
        if self._has_room():
            batch = self._again.popleft() if self._again else self._taken(now)
            if batch is not None and batch.ids:
                self._enter(batch)
        self.hear()
        self._tell_figures()

    def _enter(self, batch: Batch) -> None:
        pairs = [self._open[id] for id in batch.ids]
        requests, inputs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self._untold = True
        begun = time.monotonic()
        self._tell([self._begun(batch)])
        try:
            self._staged.begin(self._tensors(inputs, batch))
        except ValueError as error:  # arrays that the model does not take
            self._tell(self._failures(batch, requests, str(error)))
            self._rest()
            return
        self._under_way.append(_UnderWay(batch, requests, inputs, begun, time.monotonic() - begun))

    def _begun(self, entering: Batch | None = None) -> Begun:
        """Of all that is under way: any of them may be what kills a process of the group."""
        batches = [*(one.batch for one in self._under_way), *([entering] if entering else [])]
        return Begun(tuple(id for batch in batches for id in batch.ids), time.monotonic())

    def _ended(self, one: _UnderWay, made: Made) -> list[FromEngine]:
        if "error" in made:
            return self._failures(one.batch, one.requests, made["error"])
        for request in one.requests:
            del self._open[request.id]
        batch = one.batch
        self._batcher.time.seen(batch.rows * (batch.length or 1), time.monotonic() - one.begun)
        self._count(batch, one.here_s)
        return results(one.requests, one.inputs, batch, made["outputs"])

    def _failures(self, batch: Batch, requests: list[Request], why: str) -> list[FromEngine]:
        """What one request breaks must not harm those that happened to share its batch."""
        if len(requests) == 1:
            del self._open[requests[0].id]
            return [self._failed(requests[0].id, why)]
        for request in requests:
            one = self._open[request.id][1]
            self._again.append(Batch((request.id,), one.rows, padded(one.length), one.rows * (one.length or 1)))
        return []


def split(model: nn.Module, plan: Plan, facts: Mapping[str, Any], options: Mapping[str, Any]) -> SplitModel:
    return SplitModel(model, plan, facts, clock=not several_hosts())


def open_leader(
    split: SplitModel, seat: Seat, facts: Mapping[str, Any], options: Mapping[str, Any], tell: Tell
) -> StagedSinglePass:
    batcher = Batcher(options["batch"], options["latency_ms"] / 1000)
    staged = StagedForward(StagePass(split, seat, facts))
    return StagedSinglePass(staged, facts.get("pad", 0), batcher, facts.get("context", 0), tell, options["invariant"])


def follow(split: SplitModel, seat: Seat, facts: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    follow_leader(StagePass(split, seat, facts))
