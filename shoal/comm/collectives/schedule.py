"""What one rank does in each round, ready to carry out: messages grouped as they travel, and what becomes of chunks.

Messages of a pair on a lane that are in one round at both ends travel as one. Whether a value is a rank's own operand,
a sum that still lacks operands, or the result is known beforehand: it decides which sums travel unrounded, and where a
result is finished (divided, rounded). So is when a chunk's memory is free again.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from shoal.comm.collectives.actions import Action, Add, Copy, Program, Receive, Reduce, Send, Span
from shoal.comm.collectives.check import facts

OVERWRITE, RIGHT, LEFT = 0, 1, 2  # what comes replaces the chunk; is added to it as the right operand; as the left one


@dataclass(frozen=True, slots=True)
class Transfer:
    """Chunks that travel as one message."""

    peer: int
    lane: int
    chunks: tuple[int, ...]
    how: tuple[int, ...]  # OVERWRITE, RIGHT or LEFT for each; of a send: ()
    wide: bool  # sums that lack operands: of half precision, they travel in float32


@dataclass(frozen=True, slots=True)
class Step:
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    additions: tuple[tuple[int, int, int], ...]  # in order: (place in receives, first, stop of its chunks)
    local: tuple[Add | Copy, ...]
    finished: tuple[int, ...]  # chunks that become results in this round, by additions of this rank
    free: tuple[int, ...]  # chunks that this rank will not touch again, and does not end with


@lru_cache(maxsize=256)
def schedule(program: Program) -> tuple[tuple[Step, ...], ...]:
    """The steps of every rank; rounds without work are left out. Raises ProgramError for a program that is wrong."""
    known = facts(program)
    groups = _groups(program, known.partial)
    return tuple(tuple(_steps(program, rank, groups[rank], known.finished[rank])) for rank in range(program.ranks))


@lru_cache(maxsize=256)
def spans(program: Program, sizes: tuple[int, ...], alignment: int) -> tuple[Span, ...]:
    return tuple(program.spans(sizes, alignment))


def _how(action: Action) -> int:
    return OVERWRITE if isinstance(action, Receive) else LEFT if getattr(action, "incoming_first", False) else RIGHT


def _groups(
    program: Program, partial: frozenset[tuple[int, int, int]]
) -> list[dict[int, tuple[list[Transfer], list[Transfer]]]]:
    """By rank and round: (sends, receives)."""
    sent: defaultdict[tuple[int, int, int], list[tuple[int, int, bool]]] = defaultdict(list)
    received: defaultdict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for rank, rounds in enumerate(program.rounds):
        for number, actions in enumerate(rounds):
            for place, action in enumerate(actions):
                if isinstance(action, Send):
                    wide = (rank, number, place) in partial
                    sent[rank, action.to, action.lane].append((number, action.chunk, wide))
                elif isinstance(action, Receive | Reduce):
                    received[action.origin, rank, action.lane].append((number, action.chunk, _how(action)))
    out: list[dict[int, tuple[list[Transfer], list[Transfer]]]] = [{} for _ in range(program.ranks)]
    for (origin, to, lane), sends in sent.items():
        together: dict[tuple[int, int, bool], list[tuple[int, int, int]]] = {}
        for (at, chunk, wide), (then, into, how) in zip(sends, received[origin, to, lane], strict=True):
            together.setdefault((at, then, wide), []).append((chunk, into, how))
        for (at, then, wide), parts in together.items():
            chunks, into_chunks, hows = zip(*parts, strict=True)
            out[origin].setdefault(at, ([], []))[0].append(Transfer(to, lane, chunks, (), wide))
            out[to].setdefault(then, ([], []))[1].append(Transfer(origin, lane, into_chunks, hows, wide))
    return out


def _steps(
    program: Program,
    rank: int,
    groups: dict[int, tuple[list[Transfer], list[Transfer]]],
    finished: dict[int, list[int]],
) -> list[Step]:
    rounds = program.rounds[rank]
    order = [_touched(actions) for actions in rounds]
    last: dict[int, int] = {}
    for number, chunks in enumerate(order):
        for chunk in chunks:
            last[chunk] = number
    ends = set(program.ends[rank])
    free: defaultdict[int, list[int]] = defaultdict(list)
    for chunk, number in last.items():
        if chunk not in ends:
            free[number].append(chunk)
    steps = []
    for number, actions in enumerate(rounds):
        if actions:
            sends, receives = groups.get(number, ([], []))
            local = tuple(a for a in actions if isinstance(a, Add | Copy))
            done = tuple(finished.get(number, ()))
            additions = _additions(receives, actions)
            steps.append(Step(tuple(sends), tuple(receives), additions, local, done, tuple(free[number])))
    return steps


def _touched(actions: Sequence[Action]) -> set[int]:
    chunks: set[int] = set()
    for action in actions:
        chunks |= {action.into, action.other} if isinstance(action, Add | Copy) else {action.chunk}
    return chunks


def _additions(receives: Sequence[Transfer], actions: Sequence[Action]) -> tuple[tuple[int, int, int], ...]:
    """Additions of what came, in the order of the actions; neighbours in one message are one addition."""
    queues: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place, transfer in enumerate(receives):
        queue = queues.setdefault((transfer.peer, transfer.lane), [])
        queue += [(place, position) for position in range(len(transfer.chunks))]
    taken: defaultdict[tuple[int, int], int] = defaultdict(int)
    out: list[tuple[int, int, int]] = []
    for action in actions:
        if isinstance(action, Receive | Reduce):
            line = (action.origin, action.lane)
            place, position = queues[line][taken[line]]
            taken[line] += 1
            how = receives[place].how[position]
            if how != OVERWRITE:
                if out and out[-1][0] == place and out[-1][2] == position and receives[place].how[position - 1] == how:
                    out[-1] = (place, out[-1][1], position + 1)
                else:
                    out.append((place, position, position + 1))
    return tuple(out)
