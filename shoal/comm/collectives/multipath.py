"""One collective over several kinds of link at once: NVLink beside PCIe, two network interfaces.

A lane that begins after ``start_s`` and then carries ``bytes_per_s`` is done with x bytes at start_s + x / bytes_per_s.
All are done together when each carries bytes_per_s * (T - start_s); T follows from the sum. For two lanes that is
x1 = (S + b2 (a2 - a1)) b1 / (b1 + b2), as Blink and FlexLink split (Wang et al., 2020; arXiv 2510.15882). A lane that
would not have begun by then carries nothing, and where the gain is below 5 % the fastest lane carries all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.cluster.topology import Topology
from shoal.comm.collectives.actions import Add, Copy, Program, Receive, Reduce, Round, Send
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.draft import merge
from shoal.errors import UserError

WORTHWHILE = 0.05  # of the time of the fastest lane alone; below, a second lane is not worth its trouble
WEIGHT_OF_NEW = 0.5  # of an observation against what was known before
PARTS = 10_000  # shares are given in so many parts


@dataclass(frozen=True)
class Lane:
    """How long a lane takes for its part."""

    bytes_per_s: float
    start_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or not self.start_s >= 0:
            raise UserError(f"lane: needs bytes_per_s above 0 and start_s of at least 0, got {self}.")

    def seconds(self, nbytes: float) -> float:
        return self.start_s + nbytes / self.bytes_per_s if nbytes else 0.0


def split(nbytes: int, lanes: Sequence[Lane]) -> tuple[int, ...]:
    """How many of ``nbytes`` each lane carries, so that all are done at the same moment."""
    if not lanes:
        raise UserError("multipath: needs at least one lane.")
    used = sorted(range(len(lanes)), key=lambda lane: lanes[lane].start_s)
    while True:  # the lane that begins last drops out when the others are done before
        rate = sum(lanes[lane].bytes_per_s for lane in used)
        end = (nbytes + sum(lanes[lane].bytes_per_s * lanes[lane].start_s for lane in used)) / rate
        if len(used) == 1 or end > lanes[used[-1]].start_s:
            break
        used.pop()
    alone = min(range(len(lanes)), key=lambda lane: lanes[lane].seconds(nbytes))
    parts = [0] * len(lanes)
    if end > (1 - WORTHWHILE) * lanes[alone].seconds(nbytes):
        parts[alone] = nbytes
        return tuple(parts)
    for lane in used:
        parts[lane] = round(lanes[lane].bytes_per_s * (end - lanes[lane].start_s))
    parts[max(used, key=lambda lane: parts[lane])] += nbytes - sum(parts)
    return tuple(parts)


@dataclass(frozen=True)
class Fit:
    """What is known of the lanes, corrected by what is seen of them."""

    lanes: tuple[Lane, ...]

    def split(self, nbytes: int) -> tuple[int, ...]:
        return split(nbytes, self.lanes)

    def observed(self, nbytes: Sequence[int], seconds: Sequence[float]) -> "Fit":
        """The fit after a run in which lane i carried ``nbytes[i]`` in ``seconds[i]``. Its start is kept, its rate
        follows; a lane that carried nothing is left as it was."""
        if not len(nbytes) == len(seconds) == len(self.lanes):
            raise UserError(f"multipath: {len(self.lanes)} lanes need as many bytes and seconds.")
        return Fit(tuple(_corrected(*each) for each in zip(self.lanes, nbytes, seconds, strict=True)))


def _corrected(lane: Lane, nbytes: int, seconds: float) -> Lane:
    if nbytes <= 0 or seconds <= 0:
        return lane
    start = min(lane.start_s, 0.5 * seconds)
    per_byte = (1 - WEIGHT_OF_NEW) / lane.bytes_per_s + WEIGHT_OF_NEW * (seconds - start) / nbytes
    return Lane(1 / per_byte, start)


def over_lane(program: Program, topology: Topology, lane: int) -> Program:
    """The same program on ``lane`` wherever that joins two ranks; their first link elsewhere, as inside of a host."""
    joined = {(link.source, link.target) for link in topology.links if link.lane == lane}

    def moved(rank: int, actions: Round) -> Round:
        return tuple(
            a if isinstance(a, Add | Copy) else _on(a, lane if _ends(rank, a) in joined else 0) for a in actions
        )

    rounds = tuple(tuple(moved(rank, actions) for actions in part) for rank, part in enumerate(program.rounds))
    return replace(program, rounds=rounds)


def _ends(rank: int, action: Send | Receive | Reduce) -> tuple[int, int]:
    return (rank, action.to) if isinstance(action, Send) else (action.origin, rank)


def _on(action: Send | Receive | Reduce, lane: int) -> Send | Receive | Reduce:
    return replace(action, lane=lane)


def fit(programs: Sequence[Program], nbytes: int, topology: Topology) -> Fit:
    """What the cost model says of each lane's program, from its time for all the bytes and for a half of them."""
    lanes = []
    for program in programs:
        whole, half = (cost(program, size, topology).seconds for size in (nbytes, nbytes // 2))
        per_byte = max((whole - half) / (nbytes - nbytes // 2), 1e-15)
        lanes.append(Lane(1 / per_byte, max(0.0, whole - nbytes * per_byte)))
    return Fit(tuple(lanes))


def program(programs: Sequence[Program], parts: Sequence[int]) -> Program:
    """One program of those of the lanes, each for its part of every block; lanes without a part are left out.

    Best of programs with equally many rounds: a rank ends a round when the messages of all lanes are done."""
    if len(programs) != len(parts) or not any(parts):
        raise UserError(f"multipath: {len(programs)} lanes need as many parts, not all of them 0, got {list(parts)}.")
    whole = sum(parts)
    used = [(lane, round(PARTS * part / whole)) for lane, part in zip(programs, parts, strict=True)]
    used = [(lane, part) for lane, part in used if part]
    if len(used) == 1:
        return used[0][0]
    return merge([lane for lane, _ in used], "multipath", [part for _, part in used])
