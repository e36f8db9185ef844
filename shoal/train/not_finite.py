"""A step whose loss or gradient is not a number, or infinite: which worker's, which shard's, of which samples."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from shoal.comm.group import Group
from shoal.errors import RunFailed

SHOWN = 32  # sample ids of one line


@dataclass(frozen=True)
class Spoilt:
    """What one worker found on its side. Without a ``loss`` it is the gradient alone that is not finite."""

    rank: int
    shards: tuple[int, ...]  # several where the first try cannot tell them apart
    ids: tuple[int, ...]  # of samples
    loss: float | None = None


class NotFinite(RunFailed):
    """The step was not committed: weights, buffers and optimiser are as before it. The same on all workers."""

    def __init__(self, step: int, loss: float, parameter: str, spoilt: Sequence[Spoilt]) -> None:
        """``loss``: the mean of the step; ``parameter``: where its gradient is not finite, in words."""
        self.step, self.spoilt = step, tuple(spoilt)
        super().__init__(_line(step, loss, parameter, self.spoilt))

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({found.rank for found in self.spoilt}))

    def again(self) -> "NotFinite":
        """The same, said of a step that was done twice."""
        self.args = (f"the same when the step was done again, {self}",)
        return self


def all_spoilt(group: Group, mine: Sequence[Spoilt]) -> list[Spoilt]:
    """What all workers found, by rank; called by all of them."""
    rows = group.gather(json.dumps([asdict(found) for found in mine]).encode())
    return [
        Spoilt(one["rank"], tuple(one["shards"]), tuple(one["ids"]), one["loss"])
        for row in rows
        for one in json.loads(row)
    ]


def _line(step: int, loss: float, parameter: str, spoilt: Sequence[Spoilt]) -> str:
    of_loss = [found for found in spoilt if found.loss is not None]
    first = next(iter(of_loss or spoilt), None)
    if first is None:
        return f"the gradient is not finite at step {step} although the loss is ({loss:.6g}): {parameter}"
    others = len(spoilt) - 1
    who = f"rank {first.rank}{f' and {others} more' if others else ''}: "
    more = f", ... ({len(first.ids)} in all)" if len(first.ids) > SHOWN else ""
    shown = ", ".join(map(str, first.ids[:SHOWN])) + more
    one = len(first.shards) == 1
    shards = f"shard {first.shards[0]}" if one else f"one of shards {first.shards[0]} to {first.shards[-1]}"
    if first.loss is not None:
        return f"{who}loss is {first.loss} at step {step}, {shards}, sample ids {shown}"
    mean = f" although the loss is ({loss:.6g})" if math.isfinite(loss) else ""
    return f"{who}the gradient is not finite at step {step}{mean}: {parameter}, {shards}, sample ids {shown}"
