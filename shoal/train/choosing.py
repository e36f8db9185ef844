"""Who chooses the same ways of keeping activations, and what workers under a budget tell each other to choose them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from shoal.comm.group import Group
from shoal.memory.budget import Alone
from shoal.memory.table import BlockCost, Moment, Table
from shoal.parallel.held import Held
from shoal.train.rehearsed_stages import messages_ahead, moments


class Crew(Alone):
    """Workers of one stage choose alike, because they meet inside of blocks or hold copies of each other; stages choose
    each for itself."""

    def __init__(self, group: Group, held: Held, passes: int) -> None:
        """``passes``: micro-batches of a step through a pipeline."""
        axes, self._group, self._held, self._passes = held.plan.axes, group, held, passes
        self.apart = not held.plan.splits_model
        others = [axis for axis, _ in axes.sizes if axis != "pipe"]
        piped = axes.size("pipe") > 1
        self.ranks = axes.along(group.rank, *others) if piped else tuple(range(group.world))  # of those alike
        self._alike = group.split(axes.partition(*others)) if piped else group

    def alike(self, number: int) -> int:
        return _largest(self._alike, number)

    def everywhere(self, number: int) -> int:
        return _largest(self._group, number)

    def table(self, table: Table) -> Table:
        """Of those who meet inside of blocks: of each number the largest."""
        if self.apart:
            return table
        pipeline = self._held.pipeline
        own = table.moments
        if pipeline is not None:
            own = moments(self._held.schedule(max(1, self._passes)), pipeline.group.rank)
        mine = json.dumps({**asdict(table), "moments": [[each.chunk, each.flights] for each in own]}).encode()
        rows = [json.loads(row) for row in self._alike.gather(mine)]
        return Table(
            blocks=tuple(BlockCost(**_of_all(each)) for each in zip(*(row["blocks"] for row in rows), strict=True)),
            outside=tuple(max(each) for each in zip(*(row["outside"] for row in rows), strict=True)),
            moments=tuple(sorted({Moment(chunk, tuple(now)) for row in rows for chunk, now in row["moments"]})),
        )

    def message_bytes(self, table: Table) -> int:
        pipeline = self._held.pipeline
        if pipeline is None:
            return 0
        numbers = sorted(pipeline.stages)
        sent = 0
        for block in table.blocks:
            number = numbers[block.chunk]
            sent += block.outputs if number < pipeline.last else 0
            sent += block.received if number else 0  # their gradients
        return sent * messages_ahead(pipeline)

    def refusal(self, peak: int, said: str) -> str:
        rows = [json.loads(row) for row in self._group.gather(json.dumps([peak, said]).encode())]
        return str(max(rows, key=lambda row: row[0])[1])


def _largest(group: Group, number: int) -> int:
    return max(int(row) for row in group.gather(str(number).encode()))


def _of_all(rows: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    return {key: rows[0][key] if key == "name" else max(row[key] for row in rows) for key in rows[0]}
