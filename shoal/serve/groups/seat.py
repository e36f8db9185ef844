"""One process's place in its group: where it stands on the mesh, and its ways to the others."""

import os
import socket
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from shoal.comm.group import Group, HostGroup
from shoal.comm.mesh import PeerLost
from shoal.comm.stages import StageMessages, make_messages
from shoal.comm.stages.host import HostMessages
from shoal.comm.tensors import Collectives, make_collectives
from shoal.recipe.plan import Plan

LEADER = 0  # the rank that has the link to the HTTP side: at the first stage, the first of it
ORDER, VALUES, OUTPUT = range(3)  # what a message is: the first of its key


AHEAD = 8  # messages to one process of another host that may be under way: more than there are steps


class Seat:
    """Made by all processes of the group. Messages are counted by the step that they belong to."""

    def __init__(self, plan: Plan, group: Group) -> None:
        axes = plan.axes
        self.plan, self.group, self.rank = plan, group, group.rank
        self._within = "expert" if axes.size("expert") > 1 else "tensor"  # along which a stage is split
        self.stages, self.ways = axes.size("pipe"), axes.size(self._within)
        self.stage, self.slice = (axes.coordinate(self.rank, axis) for axis in ("pipe", self._within))
        self.messages = make_messages(group, torch.device("cpu"), ahead=AHEAD)
        self.collectives: Collectives | None = None
        if self.ways > 1:
            self.collectives = make_collectives(group.split(axes.partition(self._within)))
        self._answers = self.messages if isinstance(group, HostGroup) else make_messages(group, torch.device("cpu"))
        self._waiting: _Waiting | None = None  # the leader's, for answers of other hosts

    @property
    def leads(self) -> bool:
        return self.rank == LEADER

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.group.world) if rank != self.rank]

    @property
    def sockets(self) -> Sequence[socket.socket | int]:
        """Readable when somebody of the group has said something or has gone."""
        if isinstance(self.group, HostGroup):
            return self.group.mesh.sockets
        return [self._waiting.wake] if self._waiting else []

    def expects(self, origins: Iterable[int]) -> None:
        """In the leader, before the first step: these ranks will answer every step."""
        others = [rank for rank in origins if rank != LEADER]
        if others and not isinstance(self.group, HostGroup):
            self._waiting = _Waiting(self._answers, others)

    def inside(self) -> AbstractContextManager[None]:
        """What is made there is read by others of this host where it lies."""
        return self.group.arenas.inside() if isinstance(self.group, HostGroup) else nullcontext()

    def at(self, stage: int, slice: int | None = None) -> int:
        """Whose rank stands there; within the stage as this one unless it is named."""
        return self.plan.axes.rank({"pipe": stage, self._within: self.slice if slice is None else slice})

    def stage_of(self, rank: int) -> int:
        return self.plan.axes.coordinate(rank, "pipe")

    def order(self, number: int, rank: int, values: Mapping[str, Any]) -> None:
        """The leader says what step so-and-so is."""
        self.messages.send(rank, (ORDER, number), values)

    def ordered(self, number: int) -> dict[str, Any]:
        return self.messages.receive(LEADER, (ORDER, number))

    def hand_on(self, number: int, values: Mapping[str, Any]) -> None:
        """To the next stage."""
        self.messages.send(self.at(self.stage + 1), (VALUES, number), values)

    def handed(self, number: int) -> dict[str, Any]:
        """From the stage before."""
        return self.messages.receive(self.at(self.stage - 1), (VALUES, number))

    def answer(self, number: int, values: Mapping[str, Any]) -> None:
        """The end of a step, to the leader."""
        self._answers.send(LEADER, (OUTPUT, number), values)

    def answered(self, number: int, origin: int) -> dict[str, Any] | None:
        """What one of the last stage answered; None when it has not yet. Raises PeerLost."""
        if self._waiting is not None:
            return self._waiting.take(number, origin)
        assert isinstance(self._answers, HostMessages)
        return self._answers.take(origin, (OUTPUT, number))


class _Waiting:
    """A thread that waits for answers where nothing tells that one could be received."""

    def __init__(self, messages: StageMessages, origins: Sequence[int]) -> None:
        self.wake, self._woken = os.pipe()
        os.set_blocking(self.wake, False)
        self._messages, self._origins = messages, origins
        self._came: dict[tuple[int, int], dict[str, Any]] = {}
        self._failed: BaseException | None = None
        threading.Thread(target=self._wait, name="shoal-answers", daemon=True).start()

    def _wait(self) -> None:
        number = 0
        try:
            while True:
                for origin in self._origins:
                    self._came[number, origin] = self._messages.receive(origin, (OUTPUT, number))
                    os.write(self._woken, b"*")
                number += 1
        except BaseException as error:
            self._failed = error
            os.write(self._woken, b"*")

    def take(self, number: int, origin: int) -> dict[str, Any] | None:
        try:
            while os.read(self.wake, 4096):
                pass
        except BlockingIOError:
            pass
        found = self._came.pop((number, origin), None)
        if found is None and self._failed is not None:
            raise PeerLost(f"a process on another host has gone: {self._failed}") from self._failed
        return found
