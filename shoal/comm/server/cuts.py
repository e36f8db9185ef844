"""Which server holds which elements of the flat buffer: pure values, the same on every worker and server."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.comm.layout import ALIGNMENT, BLOCK, Layout
from shoal.errors import UserError


@dataclass(frozen=True)
class Piece:
    """A run of the flat buffer inside of one bucket that one server holds."""

    bucket: int
    start: int  # elements of the flat buffer
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Part:
    """A run of one slot (a parameter or a buffer) that one server holds."""

    slot: int
    start: int  # elements of the slot
    stop: int


def pieces(
    layout: Layout, gradients: int, servers: int, *, whole: bool = False, state: bool = True
) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of each server, in the order of the flat buffer.

    Slots 0 .. ``gradients`` - 1 are parameters. Their bytes are split evenly to one run of 16 elements (64 bytes of
    float32): in each bucket all servers take part, by whole blocks of the global norm, and only what does not make
    one block a server is cut finer. ``whole`` never cuts a slot, for optimisers that need whole tensors: as even as
    the tensors allow. ``state``: the buffers behind the parameters are split too.
    Raises UserError when there is not one run for each server."""
    end = _end(layout, gradients)
    units = end // ALIGNMENT
    if units < servers or (whole and gradients < servers):
        what = f"{gradients} parameters" if whole else f"{units} runs of {ALIGNMENT} elements"
        raise UserError(
            f"{servers} parameter servers for a model of {what}: each server must hold one. "
            f"Use at most {min(units, gradients) if whole else units} servers."
        )
    runs = _whole_runs(layout, gradients, servers) if whole else _even_runs(layout, end, servers)
    if state:
        stop = _end(layout, len(layout.slots))
        for server, run in enumerate(_fine(layout.state_start, stop, servers)):
            runs[server].append(run)
    return tuple(tuple(_in_buckets(layout, own)) for own in runs)


def _end(layout: Layout, slots: int) -> int:
    if slots == 0:
        return 0
    return max(s.offset + -(-s.size // ALIGNMENT) * ALIGNMENT for s in layout.slots[:slots])


def _fine(start: int, stop: int, servers: int) -> list[range]:
    """Cut a run as evenly as multiples of 16 elements allow."""
    units = -(-(stop - start) // ALIGNMENT)
    edges = [start + units * server // servers * ALIGNMENT for server in range(servers)]
    return [range(a, b) for a, b in pairwise([*edges, max(start, stop)])]


def _even_runs(layout: Layout, end: int, servers: int) -> list[list[range]]:
    blocks = end // BLOCK // servers * servers  # dealt out whole; the same number to each server
    runs: list[list[range]] = [[] for _ in range(servers)]
    turn = 0  # the next server to get one block more than the others
    for bucket in layout.buckets:
        here = max(0, min(blocks, bucket.stop // BLOCK) - bucket.start // BLOCK)
        extra = {(turn + i) % servers for i in range(here % servers)}
        turn = (turn + here) % servers
        start = bucket.start
        for server in range(servers):
            stop = start + (here // servers + (server in extra)) * BLOCK
            runs[server].append(range(start, stop))
            start = stop
    for server, run in enumerate(_fine(blocks * BLOCK, end, servers)):
        runs[server].append(run)
    return runs


def _whole_runs(layout: Layout, gradients: int, servers: int) -> list[list[range]]:
    """Contiguous runs of slots; every server gets one slot at least."""
    offsets = [slot.offset for slot in layout.slots[:gradients]] + [_end(layout, gradients)]
    cuts = [0]
    for server in range(1, servers):
        goal = offsets[-1] * server // servers
        allowed = range(cuts[-1] + 1, gradients - (servers - server) + 1)
        cuts.append(min(allowed, key=lambda slot: abs(offsets[slot] - goal)))
    return [[range(offsets[a], offsets[b])] for a, b in pairwise([*cuts, gradients])]


def _in_buckets(layout: Layout, runs: Sequence[range]) -> list[Piece]:
    found = []
    for index, bucket in enumerate(layout.buckets):
        for run in runs:
            start, stop = max(run.start, bucket.start), min(run.stop, bucket.stop)
            if start < stop:
                found.append(Piece(index, start, stop))
    return sorted(found, key=lambda piece: piece.start)


def parts(layout: Layout, held: Sequence[Piece], slots: range) -> tuple[Part, ...]:
    """The runs of the given slots that lie in the pieces; neighbours over a bucket's edge are one run."""
    joined: list[list[int]] = []
    for piece in held:
        if joined and joined[-1][1] == piece.start:
            joined[-1][1] = piece.stop
        else:
            joined.append([piece.start, piece.stop])
    found = []
    for index in slots:
        slot = layout.slots[index]
        for start, stop in joined:
            a, b = max(start, slot.offset), min(stop, slot.offset + slot.size)
            if a < b:
                found.append(Part(index, a - slot.offset, b - slot.offset))
    return tuple(found)
