"""How many bytes and messages a program moves, by rank and by link, and how many it adds."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.comm.collectives.actions import Add, Copy, Program, Reduce, Send, block_sizes

Line = tuple[int, int, int]  # (origin, to, lane)


@dataclass(frozen=True)
class Traffic:
    sent: tuple[int, ...]  # bytes, by rank
    received: tuple[int, ...]
    reduced: tuple[int, ...]  # bytes of results of additions, by rank
    messages: tuple[int, ...]  # sent, by rank; empty chunks too
    by_line: Mapping[Line, int]  # bytes by (origin, to, lane)

    @property
    def total(self) -> int:
        return sum(self.sent)

    def on_lane(self, lane: int) -> int:
        return sum(count for (_, _, on), count in self.by_line.items() if on == lane)


def traffic(program: Program, nbytes: int, itemsize: int = 1) -> Traffic:
    """``nbytes`` is the whole vector on a rank: the tensor; the input of scatter, reduce_scatter and all_to_all; the
    output of gather and all_gather. Chunks are cut at whole items of ``itemsize`` bytes."""
    spans = program.spans(block_sizes(program.collective, program.ranks, nbytes // itemsize))
    size = [(stop - start) * itemsize for start, stop in spans]
    size += [size[like] for like in program.scratch]
    n = program.ranks
    sent, received, reduced, messages = [0] * n, [0] * n, [0] * n, [0] * n
    by_line: defaultdict[Line, int] = defaultdict(int)
    for rank, _, action in program:
        if isinstance(action, Send):
            sent[rank] += size[action.chunk]
            messages[rank] += 1
            by_line[rank, action.to, action.lane] += size[action.chunk]
        elif isinstance(action, Add):
            reduced[rank] += size[action.into]
        elif not isinstance(action, Copy):
            received[rank] += size[action.chunk]
            reduced[rank] += size[action.chunk] * isinstance(action, Reduce)
    return Traffic(tuple(sent), tuple(received), tuple(reduced), tuple(messages), dict(by_line))
