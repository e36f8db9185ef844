"""A collective as a value: for every rank, rounds of actions on numbered chunks.

The vector of a collective is cut into chunks. A chunk's number means the same data on every rank: its operand, a
partial sum of it, or the result. What a rank holds when it begins (`starts`) and must hold in the end (`ends`) follows
from the collective; a chunk's result is the sum of the operands of all ranks that start with it, each once.

    collective      the vector                            starts on               ends on
    all_reduce      the tensor                            all ranks               all ranks
    reduce          the tensor                            all ranks               root
    broadcast       the tensor                            root                    all ranks
    reduce_scatter  n blocks, block r is rank r's         all ranks               block r on rank r
    all_gather      n blocks                              block r on rank r       all ranks
    scatter         n blocks                              root                    block r on rank r
    gather          n blocks                              block r on rank r       root
    all_to_all      n x n blocks, block i*n+j from i to j block row r on rank r   block column r on rank r
    send_recv       the tensor                            root                    target
    barrier         nothing; who has heard of whom        all ranks               all ranks

Rounds are a rank's own: one begins when the communications of those before are done, whatever others do. The
communications of a round are posted together and complete before its local actions, which follow in order. Messages of
a pair on a lane keep their order; those of one round at both ends travel as one.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from shoal.errors import UserError, unknown_name

COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "reduce_scatter", "all_gather", "scatter", "gather", "all_to_all",
    "send_recv", "barrier",
)  # fmt: skip
REDUCING = frozenset({"all_reduce", "reduce", "reduce_scatter"})
ROOTED = frozenset({"reduce", "broadcast", "scatter", "gather", "send_recv"})
_ONE_BLOCK = frozenset({"all_reduce", "reduce", "broadcast", "send_recv", "barrier"})


@dataclass(frozen=True, slots=True)
class Send:
    to: int
    chunk: int
    lane: int = 0  # which kind of link carries it: 0 the first, as NVLink; 1 the next, as PCIe or a second interface

    def __str__(self) -> str:
        return f"{self.chunk}>{self.to}{_lane(self.lane)}"


@dataclass(frozen=True, slots=True)
class Receive:
    """Overwrites the chunk while the message arrives."""

    origin: int
    chunk: int
    lane: int = 0

    def __str__(self) -> str:
        return f"{self.chunk}<{self.origin}{_lane(self.lane)}"


@dataclass(frozen=True, slots=True)
class Reduce:
    """chunk = chunk + incoming, or incoming + chunk; done after all messages of the round, in the order of the actions.

    So the same round may send the chunk as it was before, and may reduce several messages into one chunk."""

    origin: int
    chunk: int
    lane: int = 0
    incoming_first: bool = False

    def __str__(self) -> str:
        plus = f"{self.origin}+" if self.incoming_first else f"+{self.origin}"
        return f"{self.chunk}<{plus}{_lane(self.lane)}"


@dataclass(frozen=True, slots=True)
class Add:
    """Local: into = into + other, or other + into."""

    into: int
    other: int
    other_first: bool = False

    def __str__(self) -> str:
        return f"{self.into}={self.other}+" if self.other_first else f"{self.into}+={self.other}"


@dataclass(frozen=True, slots=True)
class Copy:
    """Local: into = other."""

    into: int
    other: int

    def __str__(self) -> str:
        return f"{self.into}={self.other}"


def _lane(lane: int) -> str:
    return f"@{lane}" if lane else ""


Communication = Send | Receive | Reduce
Action = Send | Receive | Reduce | Add | Copy
Round = tuple[Action, ...]  # communications first, then local actions
_KINDS: dict[str, type[Action]] = {kind.__name__.lower(): kind for kind in (Send, Receive, Reduce, Add, Copy)}


class Span(NamedTuple):
    """The elements ``start <= element < stop`` of a vector."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Program:
    """What every rank does. ``rounds[rank][i]`` is a round; a rank without work in it has an empty one."""

    collective: str
    algorithm: str
    ranks: int
    rounds: tuple[tuple[Round, ...], ...]
    chunks: int = 1  # of the whole vector, the same number in every block; numbered block by block
    shares: tuple[int, ...] = ()  # weights of the chunks of a block; () makes them equal
    scratch: tuple[int, ...] = ()  # chunk number `chunks + i` is scratch memory as long as data chunk scratch[i]
    root: int = 0  # the rank that a rooted collective starts or ends on; the sender of send_recv
    target: int = 0  # the receiver of send_recv

    def __post_init__(self) -> None:
        if self.collective not in COLLECTIVES:
            raise unknown_name("collective", self.collective, COLLECTIVES)
        if self.ranks < 1 or len(self.rounds) != self.ranks:
            raise UserError(f"{self.name}: {self.ranks} ranks need one list of rounds each, got {len(self.rounds)}.")
        if self.chunks < self.blocks or self.chunks % self.blocks:
            raise UserError(f"{self.name}: {self.chunks} chunks do not divide into {self.blocks} blocks.")
        if self.shares and (len(self.shares) != self.segments or min(self.shares) < 0 or not sum(self.shares)):
            raise UserError(f"{self.name}: shares must be {self.segments} weights of 0 or more, got {self.shares}.")
        if not (0 <= self.root < self.ranks and 0 <= self.target < self.ranks):
            raise UserError(f"{self.name}: root and target must be ranks from 0 to {self.ranks - 1}.")
        if any(not 0 <= like < self.chunks for like in self.scratch):
            raise UserError(
                f"{self.name}: scratch must be like chunks from 0 to {self.chunks - 1}, got {self.scratch}."
            )

    @property
    def name(self) -> str:
        return f"{self.collective} by {self.algorithm}"

    @property
    def blocks(self) -> int:
        """How many blocks of equal meaning the vector has: 1, the ranks, or their square (all_to_all)."""
        return block_count(self.collective, self.ranks)

    @property
    def segments(self) -> int:
        """Chunks of one block."""
        return self.chunks // self.blocks

    @cached_property
    def starts(self) -> tuple[range | tuple[int, ...], ...]:
        """The chunks that hold an operand when rank r begins."""
        return tuple(self._chunks_of(_start_blocks(self, rank)) for rank in range(self.ranks))

    @cached_property
    def ends(self) -> tuple[range | tuple[int, ...], ...]:
        """The chunks that must hold the result when rank r is done."""
        return tuple(self._chunks_of(_end_blocks(self, rank)) for rank in range(self.ranks))

    def _chunks_of(self, blocks: range) -> range | tuple[int, ...]:
        each = self.segments
        if blocks.step == 1:
            return range(blocks.start * each, blocks.stop * each)
        return tuple(block * each + segment for block in blocks for segment in range(each))

    def like(self, chunk: int) -> int:
        """The data chunk that is as long as this one: itself, unless it is scratch."""
        return chunk if chunk < self.chunks else self.scratch[chunk - self.chunks]

    def spans(self, sizes: Sequence[int], alignment: int = 1) -> list[Span]:
        """Where each chunk lies, for blocks of ``sizes`` elements, one after the other. Cuts inside of a block fall on
        multiples of ``alignment`` elements from its start, so that a chunk may be empty."""
        if len(sizes) != self.blocks:
            raise UserError(f"{self.name}: needs the sizes of {self.blocks} blocks, got {len(sizes)}.")
        out: list[Span] = []
        cuts: dict[int, list[int]] = {}
        begin = 0
        for size in sizes:
            if size not in cuts:
                cuts[size] = cut(size, self.shares or (1,) * self.segments, alignment)
            ends = cuts[size]
            out.extend(Span(begin + a, begin + b) for a, b in pairwise(ends))
            begin += size
        return out

    @cached_property
    def length(self) -> int:
        """The most rounds of a rank."""
        return max(map(len, self.rounds), default=0)

    @cached_property
    def lanes(self) -> int:
        """1 + the highest lane in use."""
        return 1 + max((a.lane for _, _, a in self if not isinstance(a, Add | Copy)), default=0)

    def __iter__(self) -> Iterator[tuple[int, int, Action]]:
        """(rank, round, action) of every action, rank by rank."""
        for rank, rounds in enumerate(self.rounds):
            for number, actions in enumerate(rounds):
                for action in actions:
                    yield rank, number, action

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        """A table: a line a round, a column a rank; wide ones wrap into groups of ranks. ``3>1``: sends chunk 3 to
        rank 1; ``3<1``: receives it from there; ``3<+1`` adds it; ``3<1+`` adds it as the left operand; @: the lane."""
        return "\n".join([self.headline(), *_table(self)])

    def headline(self) -> str:
        at = f", root {self.root}" if self.collective in ROOTED else ""
        to = f", target {self.target}" if self.collective == "send_recv" else ""
        cut = f" (shares {', '.join(map(str, self.shares))})" if self.shares else ""
        return f"{self.name}: {self.ranks} ranks{at}{to}, {self.chunks} chunks{cut}, {self.length} rounds"

    def to_json(self) -> str:
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rounds"}
        plain["rounds"] = [[[_to_list(a) for a in actions] for actions in rounds] for rounds in self.rounds]
        return json.dumps(plain, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Program":
        """Raises UserError when the text is not a program."""
        try:
            plain = json.loads(text)
            if set(plain) != {f.name for f in fields(Program)}:
                raise ValueError(f"its keys are {', '.join(sorted(plain))}")
            plain["rounds"] = tuple(
                tuple(tuple(_from_list(a) for a in actions) for actions in rounds) for rounds in plain["rounds"]
            )
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
            return Program(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"this is not a program in JSON: {error}.") from None


def block_count(collective: str, ranks: int) -> int:
    return 1 if collective in _ONE_BLOCK else ranks**2 if collective == "all_to_all" else ranks


def block_sizes(collective: str, ranks: int, elements: int) -> list[int]:
    """The sizes of the blocks of a collective whose whole vector on a rank is ``elements`` long: the input of scatter,
    reduce_scatter and all_to_all, the output of gather and all_gather. What does not divide lengthens the first."""
    if collective in _ONE_BLOCK:
        return [elements]
    row = [elements // ranks + (rank < elements % ranks) for rank in range(ranks)]
    return row * ranks if collective == "all_to_all" else row


def cut(size: int, shares: Sequence[int], alignment: int = 1) -> list[int]:
    """len(shares) + 1 cuts of ``size`` elements in proportion to the shares, at multiples of ``alignment``."""
    total, units = sum(shares), -(-size // alignment)
    return [0, *(min(size, (units * part // total) * alignment) for part in accumulate(shares))]


def _start_blocks(program: Program, rank: int) -> range:
    n, kind = program.ranks, program.collective
    if kind in ("broadcast", "scatter", "send_recv"):
        return range(program.blocks if rank == program.root else 0)
    if kind in ("all_gather", "gather"):
        return range(rank, rank + 1)
    return range(rank * n, (rank + 1) * n) if kind == "all_to_all" else range(program.blocks)


def _end_blocks(program: Program, rank: int) -> range:
    n, kind = program.ranks, program.collective
    if kind in ("reduce", "gather"):
        return range(program.blocks if rank == program.root else 0)
    if kind == "send_recv":
        return range(program.blocks if rank == program.target else 0)
    if kind in ("scatter", "reduce_scatter"):
        return range(rank, rank + 1)
    return range(rank, n * n, n) if kind == "all_to_all" else range(program.blocks)


def _to_list(action: Action) -> list[Any]:
    return [type(action).__name__.lower(), *asdict(action).values()]


def _from_list(plain: list[Any]) -> Action:
    kind = _KINDS.get(plain[0])
    if kind is None:
        raise unknown_name("action", str(plain[0]), _KINDS)
    return kind(*plain[1:])


def _table(program: Program, width: int = 116) -> list[str]:
    cells = [[" ".join(map(str, actions)) or "." for actions in rounds] for rounds in program.rounds]
    lines: list[str] = []
    first = 0
    while first < program.ranks:
        columns: list[list[str]] = [["round", *(str(i) for i in range(program.length))]]
        used = 0
        while first < program.ranks:
            column = [f"rank {first}", *cells[first], *[""] * (program.length - len(cells[first]))]
            used += max(map(len, column)) + 2
            if used > width and len(columns) > 1:
                break
            columns.append(column)
            first += 1
        widths = [max(map(len, column)) for column in columns]
        for row in zip(*columns, strict=True):
            lines.append("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    return lines
