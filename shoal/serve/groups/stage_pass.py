"""One batch through the stages of a group: each computes its chunk and hands on what the next one needs."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.comm.mesh import OutOfStep, PeerLost
from shoal.errors import RunFailed
from shoal.parallel.partition.arguments import bind
from shoal.parallel.partition.chunks import OUTPUT
from shoal.serve.forward import READ, arguments_of, as_array, given, read
from shoal.serve.groups.model import Names, SplitModel
from shoal.serve.groups.seat import LEADER, Seat

Made = dict[str, Any]  # {"values": ...}, {"outputs": ...} or {"error": why}
AHEAD = 1  # full batches that may be under way beside one at each stage


class StagePass:
    """A process's stage. What a stage raises goes on in the place of its values, so that all stay in step.

    What one slice of a stage raises alone leaves others in the middle of a sum: then the group ends, and says why."""

    def __init__(self, split: SplitModel, seat: Seat, facts: Mapping[str, Any]) -> None:
        self.split, self.seat, self.facts = split, seat, facts
        split.take(seat.stage, seat.slice, seat.collectives)

    @torch.inference_mode()
    def compute(self, variant: Names | None, came: Made, arguments: Mapping[str, Any]) -> Made:
        """From what the stage before has made, and the arguments of the model that this stage reads.

        Raises RunFailed when this slice alone has failed, and OutOfStep or PeerLost when another one has."""
        if "error" in came:
            return came
        made = self._computed(variant, came, arguments)
        if self.seat.collectives is None:
            return made
        own = made.get("error", "")
        try:
            failed = int(self.seat.collectives.all_reduce(torch.tensor([bool(own)], dtype=torch.int64)))
        except (OutOfStep, PeerLost) as error:
            if own:
                raise RunFailed(f"slice {self.seat.slice} of stage {self.seat.stage} alone: {own}") from error
            raise
        return made if own or not failed else {"error": "another slice of the stage has failed"}

    def _computed(self, variant: Names | None, came: Made, arguments: Mapping[str, Any]) -> Made:
        try:
            with self.seat.inside():
                chunk = self.split.chunk(self.seat.stage, variant)
                if chunk is None:
                    output = self.split.module(*arguments["args"], **arguments["named"])
                else:
                    reads = {name: arguments[name] for name in chunk.batch_inputs}
                    values = chunk.module({**came["values"], **reads})
                    if not self.seat.last:
                        return {"values": values}
                    output = values[OUTPUT]
                told = read(output, {name: arguments[name] for name in READ if name in arguments}, self.facts)
                return {"outputs": told}
        except (PeerLost, OutOfStep, RunFailed):  # of the others: this process is of no more use
            raise
        except Exception as error:  # a model's own code may raise anything
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}


def follow_leader(passing: StagePass) -> None:
    """The life of every process of a group but the leader. Ends by PeerLost."""
    seat, number = passing.seat, 0
    with torch.inference_mode():
        while True:
            order = seat.ordered(number)
            variant = None if order["variant"] is None else frozenset(order["variant"])
            came = {"values": {}} if seat.stage == 0 else seat.handed(number)
            made = passing.compute(variant, came, order["arguments"])
            del came, order
            if not seat.last:
                seat.hand_on(number, made)
            elif seat.slice == 0:
                seat.answer(number, made)
            del made
            number += 1


class StagedForward:
    """The leader's view: batches go in, their outputs come out in the same order.

    `begin` raises ValueError for arrays that the model is not cut for."""

    def __init__(self, passing: StagePass) -> None:
        self._passing, self._seat = passing, passing.seat
        self._seat.expects([self._seat.at(self._seat.stages - 1, 0)])
        self.sockets = self._seat.sockets
        self._begun = self._ended = 0
        self._here: deque[Made] = deque()  # of a group whose last stage is this one
        self._wanted = {rank: self._reads(rank) for rank in range(self._seat.group.world)}

    def _reads(self, rank: int) -> set[str]:
        stage = self._seat.stage_of(rank)
        return self._passing.split.wanted(stage) | (set(READ) if stage == self._seat.stages - 1 else set())

    @property
    def under_way(self) -> int:
        return self._begun - self._ended

    def room(self, full: bool) -> bool:
        """Whether another batch should go in: one that is not full only while a stage has nothing to do."""
        return self.under_way < self._seat.stages + (AHEAD if full and self._seat.stages > 1 else 0)

    @torch.inference_mode()
    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """Orders the batch from all, and computes this process's part of it."""
        seat, split = self._seat, self._passing.split
        variant = split.variant(frozenset(batch))
        ready = given(batch, self._passing.facts)
        args, named = arguments_of(ready)
        everything = {name: ready[name] for name in READ if name in ready}
        everything |= bind(split.module, args, named).arguments
        call = {} if seat.stages > 1 else {"args": args, "named": named}

        def arguments(rank: int) -> dict[str, Any]:
            return {name: everything[name] for name in self._wanted[rank] if name in everything} | call

        number, self._begun = self._begun, self._begun + 1

        for rank in seat.others:
            told = None if variant is None else sorted(variant)
            seat.order(number, rank, {"variant": told, "arguments": arguments(rank)})
        made = self._passing.compute(variant, {"values": {}}, arguments(LEADER))
        if seat.last:
            self._here.append(made)
        else:
            seat.hand_on(number, made)

    def finished(self) -> Made | None:
        """What became of the oldest batch under way; None when it is not done. Raises PeerLost."""
        if not self.under_way:
            return None
        seat = self._seat
        made = self._here.popleft() if seat.last else seat.answered(self._ended, seat.at(seat.stages - 1, 0))
        if made is not None:
            self._ended += 1
            if "outputs" in made:
                made["outputs"] = {name: as_array(tensor) for name, tensor in made["outputs"].items()}
        return made
