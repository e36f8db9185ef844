"""What a worker of a pipeline does, one step at a time."""

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """The values are the letters of the CSV form and of pictures."""

    FORWARD = "F"
    BACKWARD = "B"  # both gradients, in one go
    BACKWARD_INPUT = "I"  # the gradient of the inputs only: what the chunk before waits for
    BACKWARD_WEIGHT = "W"  # the gradient of the weights, at any time after I
    SEND_ACTIVATION = "SF"
    RECEIVE_ACTIVATION = "RF"
    SEND_GRADIENT = "SB"
    RECEIVE_GRADIENT = "RB"


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT})
SENDS = frozenset({Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT})
RECEIVES = frozenset({Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT})


class Action(NamedTuple):
    """One step of one worker.

    ``chunk`` is always a chunk of the worker that acts. A send carries what this chunk has just made: its output, which
    goes to chunk + 1, or the gradient of its input, which goes to chunk - 1. A receive brings what this chunk needs:
    its input, from chunk - 1, or the gradient of its output, from chunk + 1. ``peer`` is the other worker's rank in the
    pipe; -1 where nothing moves."""

    kind: Kind
    chunk: int  # counted through the whole model, from its input: 0 to chunks - 1
    micro_batch: int
    peer: int = -1

    def __str__(self) -> str:
        """ "F0.3": forward of chunk 0 on micro-batch 3; "SF0.3>1": its output goes to worker 1; "RF1.3<0"."""
        where = "" if self.peer < 0 else f"{'>' if self.kind in SENDS else '<'}{self.peer}"
        return f"{self.kind}{self.chunk}.{self.micro_batch}{where}"
