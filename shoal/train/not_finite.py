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
    stage: int = -1  # the chunk of a pipeline; below 0: there is none
    output: bool = False  # it is what the stage's forward pass hands on
    parameter: str = ""  # the first in the model's order whose gradient it is


class NotFinite(RunFailed):
    """The step was not committed: weights, buffers and optimiser are as before it. The same on all workers."""

    def __init__(self, step: int, loss: float, parameter: str, spoilt: Sequence[Spoilt]) -> None:
        """``loss``: the mean of the step; ``parameter``: where its gradient is not finite, in words, if ``spoilt``
        does not say it."""
        self.step, self.spoilt = step, tuple(sources(spoilt))
        super().__init__(_line(step, loss, parameter, self.spoilt))

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({found.rank for found in self.spoilt}))

    def again(self) -> "NotFinite":
        """The same, said of a step that was done twice."""
        self.args = (f"the same when the step was done again, {self}",)
        return self


def all_told(group: Group, mine: Sequence[Spoilt], parameter: str) -> tuple[list[Spoilt], str]:
    """What all workers found, by rank, and the first one's words of a parameter; called by all of them."""
    rows = [json.loads(row) for row in group.gather(json.dumps([list(map(asdict, mine)), parameter]).encode())]
    found = [Spoilt(**{**one, "shards": tuple(one["shards"]), "ids": tuple(one["ids"])})
             for row, _ in rows for one in row]  # fmt: skip
    return found, next((words for _, words in rows if words), "")


def sources(found: Sequence[Spoilt]) -> list[Spoilt]:
    """Where it came from, of all that a pipeline has spread: activations go to later stages, gradients to earlier."""
    forward = [each for each in found if each.output or each.loss is not None]
    lost = {each.shards for each in forward if each.loss is not None}
    if lost:
        passes = [each for each in forward if each.shards in lost]
        first = {each.shards: min(other.stage for other in passes if other.shards == each.shards) for each in passes}
        return [each for each in passes if each.stage == first[each.shards]]
    backward = [each for each in found if not each.output]
    last = {each.shards: max(other.stage for other in backward if other.shards == each.shards) for each in backward}
    return [each for each in backward if each.stage == last[each.shards]]


def _line(step: int, loss: float, parameter: str, spoilt: Sequence[Spoilt]) -> str:
    first = next(iter(spoilt), None)
    if first is None:
        return f"the gradient is not finite at step {step} although the loss is ({loss:.6g}): {parameter}"
    others = len(spoilt) - 1
    stage = f" (stage {first.stage})" if first.stage >= 0 else ""
    who = f"rank {first.rank}{stage}{f' and {others} more' if others else ''}: "
    if first.parameter:
        parameter = f"that of parameter {first.parameter!r} is not"
    more = f", ... ({len(first.ids)} in all)" if len(first.ids) > SHOWN else ""
    shown = ", ".join(map(str, first.ids[:SHOWN])) + more
    one = len(first.shards) == 1
    shards = f"shard {first.shards[0]}" if one else f"one of shards {first.shards[0]} to {first.shards[-1]}"
    if first.loss is not None:
        return f"{who}loss is {first.loss} at step {step}, {shards}, sample ids {shown}"
    if first.output:
        return f"{who}what its forward pass hands on is not a number at step {step}, {shards}, sample ids {shown}"
    mean = f" although the loss is ({loss:.6g})" if math.isfinite(loss) else ""
    return f"{who}the gradient is not finite at step {step}{mean}: {parameter}, {shards}, sample ids {shown}"
