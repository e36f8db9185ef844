"""How programs are written: messages are noted once for both ends, and whole programs are put together.

    draft = Draft(ranks, chunks)
    draft.message(step, origin, to, chunk, reduce=True)     # Send at one end, Reduce at the other, in round `step`
    program = draft.program("all_reduce", "mine")

`merge` runs programs side by side on parts of every block, `chain` one after the other, `relabel` gives the ranks other
numbers, `on_lane` moves all messages to another kind of link.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from shoal.comm.collectives.actions import (
    Action,
    Add,
    Copy,
    Program,
    Receive,
    Reduce,
    Round,
    Send,
    block_count,
)
from shoal.errors import UserError


class Draft:
    """A program in the making. ``chunks`` is the number of data chunks of the whole vector."""

    def __init__(self, ranks: int, chunks: int) -> None:
        self.ranks, self.chunks = ranks, chunks
        self.scratch: list[int] = []
        self.steps = 0  # rounds so far
        self._messages: list[defaultdict[int, list[Action]]] = [defaultdict(list) for _ in range(ranks)]
        self._local: list[defaultdict[int, list[Action]]] = [defaultdict(list) for _ in range(ranks)]

    def scratch_like(self, chunk: int) -> int:
        """The number of a new piece of scratch memory, as long as ``chunk``, on every rank that uses it."""
        self.scratch.append(chunk)
        return self.chunks + len(self.scratch) - 1

    def message(
        self,
        step: int,
        origin: int,
        to: int,
        chunk: int,
        into: int | None = None,
        *,
        lane: int = 0,
        reduce: bool = False,
        incoming_first: bool = False,
    ) -> None:
        """``origin`` sends ``chunk`` in round ``step``; ``to`` receives it into the same chunk, or ``into``.

        ``reduce`` adds it there: chunk + incoming, or incoming + chunk where ``incoming_first``."""
        self.steps = max(self.steps, step + 1)
        target = chunk if into is None else into
        self._messages[origin][step].append(Send(to, chunk, lane))
        self._messages[to][step].append(
            Reduce(origin, target, lane, incoming_first) if reduce else Receive(origin, target, lane)
        )

    def local(self, step: int, rank: int, action: Add | Copy) -> None:
        self.steps = max(self.steps, step + 1)
        self._local[rank][step].append(action)

    def program(
        self, collective: str, algorithm: str, *, shares: Sequence[int] = (), root: int = 0, target: int = 0
    ) -> Program:
        rounds = tuple(
            tuple((*messages.get(step, ()), *local.get(step, ())) for step in range(self.steps))
            for messages, local in zip(self._messages, self._local, strict=True)
        )
        return Program(
            collective=collective,
            algorithm=algorithm,
            ranks=self.ranks,
            rounds=rounds,
            chunks=self.chunks,
            shares=tuple(shares),
            scratch=tuple(self.scratch),
            root=root,
            target=target,
        )


def changed(action: Action, rank: Callable[[int], int], chunk: Callable[[int], int]) -> Action:
    """The action with other numbers for ranks and chunks."""
    if isinstance(action, Send):
        return Send(rank(action.to), chunk(action.chunk), action.lane)
    if isinstance(action, Receive):
        return Receive(rank(action.origin), chunk(action.chunk), action.lane)
    if isinstance(action, Reduce):
        return Reduce(rank(action.origin), chunk(action.chunk), action.lane, action.incoming_first)
    if isinstance(action, Add):
        return Add(chunk(action.into), chunk(action.other), action.other_first)
    return Copy(chunk(action.into), chunk(action.other))


def _same(number: int) -> int:
    return number


def _renumbered(program: Program, chunk: Callable[[int], int]) -> tuple[tuple[Round, ...], ...]:
    return tuple(
        tuple(tuple(changed(action, _same, chunk) for action in actions) for actions in rounds)
        for rounds in program.rounds
    )


def _joined(parts: Sequence[Round]) -> Round:
    """Rounds that happen at once: all messages first, then what is local."""
    messages = [action for part in parts for action in part if not isinstance(action, Add | Copy)]
    return (*messages, *(action for part in parts for action in part if isinstance(action, Add | Copy)))


def merge(programs: Sequence[Program], algorithm: str, weights: Sequence[int] = (), *, delay: int = 0) -> Program:
    """Programs of one collective side by side, round by round: program i carries ``weights[i]`` parts of every block.

    The parts lie one after the other. Without weights all parts are equal. Program i begins i * ``delay`` rounds later:
    parts that follow each other through phases on different links keep all of them busy. Scratch is not shared."""
    first = programs[0]
    alike = {(p.collective, p.ranks, p.root, p.target) for p in programs}
    if len(alike) != 1:
        raise UserError(f"merge: the programs must be of one collective, ranks and root, got {sorted(alike)}.")
    weights = weights or [1] * len(programs)
    each = sum(p.segments for p in programs)  # chunks of a block in the whole
    whole = [sum(p.shares) or p.segments for p in programs]
    scale = 1
    for total in whole:
        scale *= total
    shares: list[int] = []
    scratch: list[int] = []
    parts: list[tuple[tuple[Round, ...], ...]] = []
    data = each * first.blocks
    for program, weight, total in zip(programs, weights, whole, strict=True):
        before, held, mine = len(shares), len(scratch), program.segments

        def number(
            chunk: int, before: int = before, held: int = held, mine: int = mine, limit: int = program.chunks
        ) -> int:
            if chunk >= limit:
                return data + held + chunk - limit
            return chunk // mine * each + before + chunk % mine

        parts.append(_renumbered(program, number))
        scratch.extend(number(like) for like in program.scratch)
        shares.extend(weight * share * (scale // total) for share in program.shares or (1,) * mine)
    length = max(p.length + i * delay for i, p in enumerate(programs))

    def at_once(rank: int, step: int) -> Round:
        begun = ((part[rank], step - i * delay) for i, part in enumerate(parts))
        return _joined([rounds[own] for rounds, own in begun if 0 <= own < len(rounds)])

    rounds = tuple(tuple(at_once(rank, step) for step in range(length)) for rank in range(first.ranks))
    return replace(
        first,
        algorithm=algorithm,
        rounds=rounds,
        chunks=data,
        shares=() if len(set(shares)) == 1 else tuple(shares),
        scratch=tuple(scratch),
    )


def chain(
    collective: str, algorithm: str, programs: Sequence[Program], *, root: int | None = None, target: int = 0
) -> Program:
    """Programs on the same chunks one after the other, as one of ``collective``: all_reduce is a reduce_scatter and an
    all_gather. Each has its own scratch."""
    first = programs[0]
    if len({(p.ranks, p.chunks) for p in programs}) != 1:
        raise UserError("chain: the programs must have the same ranks and chunks.")
    scratch: list[int] = []
    rounds: list[list[Round]] = [[] for _ in range(first.ranks)]
    for program in programs:
        held = len(scratch)

        def number(chunk: int, held: int = held, limit: int = program.chunks) -> int:
            return chunk if chunk < limit else chunk + held

        for rank, part in enumerate(_renumbered(program, number) if held else program.rounds):
            rounds[rank] += [*part, *[()] * (program.length - len(part))]
        scratch.extend(program.scratch)
    shares: tuple[int, ...] = ()
    if first.shares:
        shares = first.shares * (first.blocks // block_count(collective, first.ranks))
    return Program(
        collective=collective,
        algorithm=algorithm,
        ranks=first.ranks,
        rounds=tuple(map(tuple, rounds)),
        chunks=first.chunks,
        shares=shares,
        scratch=tuple(scratch),
        root=first.root if root is None else root,
        target=target,
    )


def relabel(program: Program, order: Sequence[int]) -> Program:
    """The same program with other numbers for the ranks: what rank i did, rank ``order[i]`` does; blocks go along."""
    n, each = program.ranks, program.segments
    if sorted(order) != list(range(n)):
        raise UserError(f"{program.name}: the order must name each of {n} ranks once, got {list(order)}.")

    def chunk(number: int) -> int:
        if number >= program.chunks or program.blocks == 1:
            return number
        block, segment = divmod(number, each)
        if program.collective == "all_to_all":
            return (order[block // n] * n + order[block % n]) * each + segment
        return order[block] * each + segment

    rounds: list[tuple[Round, ...]] = [()] * n
    for rank, part in enumerate(program.rounds):
        rounds[order[rank]] = tuple(
            tuple(changed(action, order.__getitem__, chunk) for action in actions) for actions in part
        )
    return replace(
        program,
        rounds=tuple(rounds),
        scratch=tuple(map(chunk, program.scratch)),
        root=order[program.root],
        target=order[program.target],
    )


def on_lane(program: Program, lane: int) -> Program:
    """The same program with every message on ``lane``."""
    return replace(
        program,
        rounds=tuple(
            tuple(tuple(a if isinstance(a, Add | Copy) else replace(a, lane=lane) for a in actions) for actions in part)
            for part in program.rounds
        ),
    )
