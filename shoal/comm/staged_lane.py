"""From one worker of a host to another by way of a little of their heap: for what must not lie on it as a whole."""

import torch
from torch import Tensor

from shoal.comm.group import HostGroup

STAGE_BYTES = 1 << 20  # of each worker
_THERE, _TAKEN = 1, 2  # the message kinds of its channel


class StagedLane:
    """What is sent is copied twice, and never more than `STAGE_BYTES` of it are in shared memory."""

    def __init__(self, group: HostGroup) -> None:
        """Called by all workers of the group."""
        self._rank = group.rank
        self._words = group.split([range(group.world)]).mesh
        self._stages = group.heap.tensor(group.world * STAGE_BYTES, torch.uint8).view(group.world, STAGE_BYTES)
        self._sent, self._received = [0] * group.world, [0] * group.world

    def send(self, data: Tensor, to: int) -> None:
        """A flat tensor. Returns when it has been received."""
        for part in torch.split(data.contiguous().view(torch.uint8), STAGE_BYTES):
            self._stages[self._rank, : len(part)].copy_(part)
            self._sent[to] += 1
            self._words.send(to, _THERE, self._sent[to])
            self._words.receive(to, _TAKEN, self._sent[to])

    def receive(self, out: Tensor, origin: int) -> None:
        """Into a flat tensor, contiguous, as long as what is sent."""
        for part in torch.split(out.view(torch.uint8), STAGE_BYTES):
            self._received[origin] += 1
            self._words.receive(origin, _THERE, self._received[origin])
            part.copy_(self._stages[origin, : len(part)])
            self._words.send(origin, _TAKEN, self._received[origin])
