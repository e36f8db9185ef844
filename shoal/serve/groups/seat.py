"""One process's place in its group: where it stands on the mesh, and its ways to the others."""

import socket
from collections.abc import Mapping
from typing import Any

from shoal.comm.group import HostGroup
from shoal.comm.stages.host import HostMessages
from shoal.comm.tensors import Collectives, make_collectives
from shoal.recipe.plan import Plan

LEADER = 0  # the rank that has the link to the HTTP side: at the first stage, first along axis tensor
ORDER, VALUES, OUTPUT = range(3)  # what a message is: the first of its key


class Seat:
    """Made by all processes of the group. Messages are counted by the step that they belong to."""

    def __init__(self, plan: Plan, group: HostGroup) -> None:
        axes = plan.axes
        self.plan, self.group, self.rank = plan, group, group.rank
        self.stages, self.ways = axes.size("pipe"), axes.size("tensor")
        self.stage, self.slice = (axes.coordinate(self.rank, axis) for axis in ("pipe", "tensor"))
        self.messages = HostMessages(group)
        self.collectives: Collectives | None = None
        if self.ways > 1:
            self.collectives = make_collectives(group.split(axes.partition("tensor")))

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
    def sockets(self) -> list[socket.socket]:
        """Readable when somebody of the group has said something or has gone."""
        return self.group.mesh.sockets

    def at(self, stage: int, slice: int | None = None) -> int:
        """Whose rank stands there; along axis tensor as this one unless it is named."""
        return self.plan.axes.rank({"pipe": stage, "tensor": self.slice if slice is None else slice})

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
        self.messages.send(LEADER, (OUTPUT, number), values)

    def answered(self, number: int, origin: int) -> dict[str, Any] | None:
        """What one of the last stage answered; None when it has not yet. Raises PeerLost."""
        return self.messages.take(origin, (OUTPUT, number))
