"""Proves a program by running it on symbols: every operand is a name, every value an expression of additions.

Checked: each rank ends with the sum of exactly the right operands, each once; nothing is read before it is written;
nothing is sent and overwritten in one round; each message has its receiver, and no message is left over; nobody waits
in a circle, even when no message is buffered (a send is done when its receiver has come to the matching round). What
comes out is the order of all additions, since no message can change it: every sum is an expression known beforehand.
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from functools import cached_property

from shoal.comm.collectives.actions import Action, Add, Communication, Copy, Program, Receive, Reduce, Send
from shoal.errors import ShoalError

Tree = int | tuple["Tree", "Tree"]  # the operand of a rank, or left + right


class ProgramError(ShoalError):
    """A program does not do what its collective says; the message names rank, round and action."""


@dataclass(frozen=True)
class Order:
    """In which order a program adds: the expression of every result."""

    program: Program
    results: tuple[dict[int, int], ...]  # by rank: data chunk -> expression, of the chunks that it ends with
    parts: tuple[tuple[int, int], ...]  # expression -> its operands; (-1, rank) is rank's own operand

    def tree(self, rank: int, chunk: int) -> Tree:
        """Nested pairs: ((0, 1), 2) is (operand of rank 0 + that of rank 1) + that of rank 2."""
        return self._trees[self.results[rank][chunk]]

    def text(self, rank: int, chunk: int) -> str:
        return self._texts[self.results[rank][chunk]]

    @cached_property
    def agrees(self) -> bool:
        """All ranks that end with a chunk have added it in the same order, so that their bits are the same."""
        seen: dict[int, int] = {}
        return all(seen.setdefault(chunk, e) == e for held in self.results for chunk, e in held.items())

    @cached_property
    def uniform(self) -> bool:
        """All chunks are added in the same order too, so that the bits do not depend on how the vector is cut."""
        return len({self._trees[e] for held in self.results for e in held.values()}) <= 1

    @cached_property
    def depth(self) -> int:
        """The longest chain of additions: rounding errors grow with it."""
        depths: list[int] = []
        for left, right in self.parts:
            depths.append(0 if left < 0 else 1 + max(depths[left], depths[right]))
        return max((depths[e] for held in self.results for e in held.values()), default=0)

    @cached_property
    def _trees(self) -> list[Tree]:
        out: list[Tree] = []
        for left, right in self.parts:  # operands come before what is made of them
            out.append(right if left < 0 else (out[left], out[right]))
        return out

    @cached_property
    def _texts(self) -> list[str]:
        out: list[str] = []
        for left, right in self.parts:
            out.append(str(right) if left < 0 else f"({out[left]}+{out[right]})")
        return out

    def __str__(self) -> str:
        """A line for every order: the chunks that are added in it."""
        groups: defaultdict[str, dict[int, None]] = defaultdict(dict)
        for rank, held in enumerate(self.results):
            for chunk in held:
                groups[self.text(rank, chunk)][chunk] = None
        return "\n".join(f"chunks {', '.join(map(str, chunks))}: {text}" for text, chunks in groups.items())


def order(program: Program) -> Order:
    """In which order the program adds. Raises ProgramError as ``check``, but ranks may add in different orders."""
    return _Run(program).order()


@dataclass(frozen=True)
class Facts:
    """What is known of the values of a program before it runs."""

    partial: frozenset[tuple[int, int, int]]  # (rank, round, place in it) of Sends of sums that still lack operands
    finished: tuple[dict[int, list[int]], ...]  # by rank, by round: chunks that become results by an addition there


def facts(program: Program) -> Facts:
    """Raises ProgramError as ``check``."""
    run = _Run(program)
    run.order()
    finished = tuple({number: list(chunks) for number, chunks in rank.items()} for rank in run.finished)
    return Facts(frozenset(run.partial), finished)


def check(program: Program) -> Order:
    """Raises ProgramError, naming rank, round and action, unless the program does exactly what its collective says, and
    all ranks that end with a chunk have added it in one order."""
    found = order(program)
    if program.collective != "barrier":
        first: dict[int, int] = {}
        for rank, held in enumerate(found.results):
            for chunk, expression in held.items():
                other = first.setdefault(chunk, rank)
                if found.results[other][chunk] != expression:
                    mine, theirs = found.text(rank, chunk), found.text(other, chunk)
                    where = f"{program.name}: rank {rank}, at the end: chunk {chunk}"
                    raise ProgramError(f"{where} was added as {mine}, on rank {other} as {theirs}")
    return found


def _at(rank: int, number: int, action: Action) -> str:
    return f"rank {rank}, round {number}, {type(action).__name__}({action})"


class _Run:
    """One symbolic run. A value is (expression, data chunk); an expression is a number, its operands a set of bits."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.parts: list[tuple[int, int]] = []
        self.operands: list[int] = []  # by expression: the ranks in it, a bit each
        self._known: dict[tuple[int, int], int] = {}
        self.memory: list[dict[int, tuple[int, int]]] = []
        for rank, chunks in enumerate(program.starts):
            own = self._expression((-1, rank), 1 << rank)
            self.memory.append({chunk: (own, chunk) for chunk in chunks})
        self.want: defaultdict[int, int] = defaultdict(int)  # by data chunk: the ranks with an operand of it
        for rank, chunks in enumerate(program.starts):
            for chunk in chunks:
                self.want[chunk] |= 1 << rank
        self.partial: set[tuple[int, int, int]] = set()
        self.finished: list[defaultdict[int, dict[int, None]]] = [defaultdict(dict) for _ in range(program.ranks)]
        self._well_formed()
        # by (origin, to, lane): where each message is sent and received: (rank's round, place in it)
        self.partners: list[list[set[tuple[int, int]]]] = [[set() for _ in rounds] for rounds in program.rounds]
        self._match()
        self.inbox: defaultdict[tuple[int, int, int], deque[tuple[int, int]]] = defaultdict(deque)

    def order(self) -> Order:
        self._run()
        return Order(self.program, tuple(self._results()), tuple(self.parts))

    def _expression(self, parts: tuple[int, int], operands: int) -> int:
        found = self._known.get(parts)
        if found is None:
            found = self._known[parts] = len(self.parts)
            self.parts.append(parts)
            self.operands.append(operands)
        return found

    def _fail(self, where: str, why: str) -> ProgramError:
        return ProgramError(f"{self.program.name}: {where}: {why}")

    def _well_formed(self) -> None:
        program = self.program
        ids = program.chunks + len(program.scratch)
        for rank, rounds in enumerate(program.rounds):
            for number, actions in enumerate(rounds):
                local = False
                for action in actions:
                    where = _at(rank, number, action)
                    if isinstance(action, Add | Copy):
                        local = True
                        touched: tuple[int, ...] = (action.into, action.other)
                    else:
                        peer = action.to if isinstance(action, Send) else action.origin
                        touched = (action.chunk,)
                        if local:
                            raise self._fail(where, "communication after local actions of the round: it must be first")
                        if not 0 <= peer < program.ranks or peer == rank:
                            raise self._fail(where, f"no peer {peer}: there are ranks 0 to {program.ranks - 1}")
                        if action.lane < 0:
                            raise self._fail(where, f"lane {action.lane} is below 0")
                    if not all(0 <= chunk < ids for chunk in touched):
                        raise self._fail(where, f"there is no such chunk: {ids} are numbered from 0")
                    if len(touched) == 2 and program.like(touched[0]) != program.like(touched[1]):
                        raise self._fail(where, f"chunks {touched[0]} and {touched[1]} differ in length")
                self._no_race(rank, number, [a for a in actions if not isinstance(a, Add | Copy)])

    def _no_race(self, rank: int, number: int, messages: list[Communication]) -> None:
        sent = {a.chunk for a in messages if isinstance(a, Send)}
        written: set[int] = set()
        for action in messages:
            if isinstance(action, Receive):
                if action.chunk in sent:
                    why = f"chunk {action.chunk} is overwritten while the same round sends it"
                    raise self._fail(_at(rank, number, action), why)
                if action.chunk in written:
                    why = f"chunk {action.chunk} is received twice in one round"
                    raise self._fail(_at(rank, number, action), why)
                written.add(action.chunk)

    def _match(self) -> None:
        sends: defaultdict[tuple[int, int, int], list[tuple[int, Action]]] = defaultdict(list)
        receives: defaultdict[tuple[int, int, int], list[tuple[int, Action]]] = defaultdict(list)
        for rank, number, action in self.program:
            if isinstance(action, Send):
                sends[rank, action.to, action.lane].append((number, action))
            elif isinstance(action, Receive | Reduce):
                receives[action.origin, rank, action.lane].append((number, action))
        for link in sorted({*sends, *receives}):
            origin, to, lane = link
            out, into = sends[link], receives[link]
            for (sent, send), (received, receive) in zip(out, into, strict=False):
                assert isinstance(send, Send)
                assert isinstance(receive, Receive | Reduce)
                if self.program.like(send.chunk) != self.program.like(receive.chunk):
                    why = f"the message that comes is chunk {send.chunk} ({_at(origin, sent, send)})"
                    raise self._fail(_at(to, received, receive), why)
                self.partners[origin][sent].add((to, received))
                self.partners[to][received].add((origin, sent))
            if len(into) > len(out):
                why = f"nothing comes: rank {origin} sends {len(out)} of {len(into)} messages on lane {lane}"
                raise self._fail(_at(to, *into[len(out)]), why)
            if len(out) > len(into):
                why = f"the message is left over: rank {to} receives {len(into)} of {len(out)} on lane {lane}"
                raise self._fail(_at(origin, *out[len(into)]), why)

    def _run(self) -> None:
        program = self.program
        self.at = at = [-1] * program.ranks  # the round that each rank has posted
        missing = [[0] * len(rounds) for rounds in program.rounds]
        ready = deque(range(program.ranks))  # ranks whose round is done: they post the next
        while ready:
            rank = ready.popleft()
            if at[rank] >= 0:
                self._complete(rank, at[rank])
            at[rank] += 1
            number = at[rank]
            if number == len(program.rounds[rank]):
                continue
            self._post(rank, number)
            for peer, theirs in self.partners[rank][number]:
                if at[peer] < theirs:
                    missing[rank][number] += 1
                else:
                    missing[peer][theirs] -= 1
                    if not missing[peer][theirs] and at[peer] == theirs:
                        ready.append(peer)
            if not missing[rank][number]:
                ready.append(rank)
        stuck = [rank for rank in range(program.ranks) if at[rank] < len(program.rounds[rank])]
        if stuck:
            raise ProgramError(f"{program.name}: deadlock: {self._circle(stuck[0])}")

    def _circle(self, rank: int) -> str:
        """Who waits for whom, from a rank that is stuck until it comes round to one that was named."""
        told: dict[int, str] = {}
        while rank not in told:
            number = self.at[rank]
            peer, theirs = min((p, j) for p, j in self.partners[rank][number] if self.at[p] < j)
            action = next(
                a
                for a in self.program.rounds[rank][number]
                if not isinstance(a, Add | Copy) and (a.to if isinstance(a, Send) else a.origin) == peer
            )
            told[rank] = f"{_at(rank, number, action)} waits for rank {peer} to reach round {theirs}"
            rank = peer
        return "; ".join(told.values())

    def _read(self, rank: int, number: int, action: Action, chunk: int) -> tuple[int, int]:
        value = self.memory[rank].get(chunk)
        if value is None:
            raise self._fail(_at(rank, number, action), f"chunk {chunk} is read before anything is written to it")
        return value

    def _post(self, rank: int, number: int) -> None:
        for place, action in enumerate(self.program.rounds[rank][number]):
            if isinstance(action, Send):
                value = self._read(rank, number, action, action.chunk)
                operands = self.operands[value[0]]
                if operands & (operands - 1) and operands != self.want[value[1]]:
                    self.partial.add((rank, number, place))
                self.inbox[rank, action.to, action.lane].append(value)

    def _complete(self, rank: int, number: int) -> None:
        memory, reductions = self.memory[rank], []
        for action in self.program.rounds[rank][number]:
            if isinstance(action, Receive | Reduce):
                value = self.inbox[action.origin, rank, action.lane].popleft()
                if isinstance(action, Receive):
                    memory[action.chunk] = value
                else:
                    reductions.append((action, value))
        for reduce, value in reductions:
            own = self._read(rank, number, reduce, reduce.chunk)
            left, right = (value, own) if reduce.incoming_first else (own, value)
            memory[reduce.chunk] = self._sum(rank, number, reduce, left, right, reduce.chunk)
        for action in self.program.rounds[rank][number]:
            if isinstance(action, Add):
                left, right = (self._read(rank, number, action, c) for c in (action.into, action.other))
                if action.other_first:
                    left, right = right, left
                memory[action.into] = self._sum(rank, number, action, left, right, action.into)
            elif isinstance(action, Copy):
                memory[action.into] = self._read(rank, number, action, action.other)
                finished = self.finished[rank][number]
                finished.pop(action.into, None)
                if action.other in finished:
                    finished[action.into] = None

    def _sum(
        self, rank: int, number: int, action: Action, left: tuple[int, int], right: tuple[int, int], into: int
    ) -> tuple[int, int]:
        (a, chunk), (b, other) = left, right
        if chunk != other:
            raise self._fail(_at(rank, number, action), f"adds data of chunk {other} to data of chunk {chunk}")
        twice = self.operands[a] & self.operands[b]
        if twice and self.program.collective != "barrier":  # to have heard of a rank twice does no harm
            raise self._fail(_at(rank, number, action), f"adds the operand of {_ranks(twice)} a second time")
        operands = self.operands[a] | self.operands[b]
        if operands == self.want[chunk]:
            self.finished[rank][number][into] = None
        return self._expression((a, b), operands), chunk

    def _results(self) -> list[dict[int, int]]:
        program, want = self.program, self.want
        results: list[dict[int, int]] = []
        for rank, chunks in enumerate(program.ends):
            held: dict[int, int] = {}
            for chunk in chunks:
                where = f"rank {rank}, at the end"
                value = self.memory[rank].get(chunk)
                if value is None:
                    raise self._fail(where, f"chunk {chunk} was never written")
                expression, data = value
                if data != chunk:
                    raise self._fail(where, f"chunk {chunk} holds data of chunk {data}")
                lacking = want[chunk] & ~self.operands[expression]
                if lacking:
                    raise self._fail(where, f"chunk {chunk} lacks the operand of {_ranks(lacking)}")
                held[chunk] = expression
            results.append(held)
        return results


def _ranks(bits: int) -> str:
    named = [str(rank) for rank in range(bits.bit_length()) if bits >> rank & 1]
    return f"rank {named[0]}" if len(named) == 1 else f"ranks {', '.join(named)}"
