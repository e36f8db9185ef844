"""Which rows each step computes: who runs, who waits, who is put off when the cache is full.

A pure decider: it knows token numbers, blocks and times that it is told, but no model and no clock. Sequences have a
fixed order: by arrival, where a unit of priority is worth `Limits.priority_s` seconds of it. Only finitely many can
ever come before a given one, and the first in the order can always have all memory: none starves. The order is Orca's
iteration-level scheduling (Yu et al., 2022) with chunked prompts (Agrawal et al., 2023) and pre-emption by computing
again (Kwon et al., 2023); what a pre-empted sequence had is often found again among the kept blocks.
"""

import heapq
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.serve.generation.blocks import BlockPool, block_key
from shoal.serve.generation.pace import Pace
from shoal.serve.generation.step import BLOCK

PROMPTS_AT_ONCE = 16  # streams whose prompts come forward side by side


@dataclass(frozen=True)
class Limits:
    running: int = 64  # sequences that hold cache at a time
    priority_s: float = 10.0  # how much earlier than it did a request of one priority more seems to have come


class Order(NamedTuple):
    arrived: float  # made earlier by the priority
    request: int
    choice: int


@dataclass(slots=True, eq=False)
class Stream:
    """One sequence of tokens that grows."""

    order: Order
    priority: int
    deadline: float
    tokens: list[int]
    salt: bytes
    blocks: list[int] = field(default_factory=list)  # where its tokens lie, BLOCK to a block
    keys: list[bytes] = field(default_factory=list)  # names of its tokens' full blocks, as far as they were needed
    published: int = 0  # full blocks that others can find
    computed: int = 0  # tokens whose keys and values are in the cache
    reused: int = 0  # of them, when it was last admitted, found there
    draft: list[int] = field(default_factory=list)  # guesses of what comes after its tokens
    running: bool = False

    def __lt__(self, other: "Stream") -> bool:
        return self.order < other.order

    @property
    def name(self) -> tuple[int, int]:
        return self.order.request, self.order.choice


class Slice(NamedTuple):
    """Rows of one stream: its tokens and draft from ``start`` on. The logits of the last ``wants`` are wanted."""

    stream: Stream
    start: int
    rows: int
    wants: int


@dataclass(frozen=True)
class Plan:
    slices: Sequence[Slice]
    expired: Sequence[int]  # requests whose deadline has passed; they are gone


class Scheduler:
    def __init__(self, blocks: int, limits: Limits, pace: Pace) -> None:
        self.pool = BlockPool(blocks)
        self.limits = limits
        self.pace = pace
        self.streams: dict[tuple[int, int], Stream] = {}
        self.running: list[Stream] = []  # in order
        self.waiting: list[Stream] = []  # a heap
        self.preempted = 0  # since the start
        self._deadlines: list[tuple[float, int]] = []  # a heap; those that have ended are still in it

    def refusal(self, longest: int, choices: int) -> str:
        """Why a request of so many streams of so many tokens could never be served; "" when it can."""
        if choices > self.limits.running:
            return f"{choices} sequences are more than the {self.limits.running} that can run at a time"
        need = choices * -(-longest // BLOCK)
        if need > self.pool.count:
            return f"{choices} x {longest} tokens need {need} cache blocks of {BLOCK}; there are {self.pool.count}"
        return ""

    def submit(
        self,
        request: int,
        tokens: Iterable[int],
        arrived: float,
        *,
        priority: int = 0,
        deadline: float = float("inf"),
        salt: bytes = b"",
        choice: int = 0,
    ) -> Stream:
        """A sequence of at least one token that waits for its first step. What `refusal` refuses must not come."""
        order = Order(arrived - priority * self.limits.priority_s, request, choice)
        stream = Stream(order, priority, deadline, list(tokens), salt)
        self.streams[stream.name] = stream
        heapq.heappush(self.waiting, stream)
        if deadline != float("inf"):
            heapq.heappush(self._deadlines, (deadline, request))
        return stream

    def fork(self, parent: Stream, choice: int) -> tuple[Stream, tuple[int, int] | None]:
        """Another sequence of the same request with the same tokens, between two steps.

        Full blocks are shared; the rest of the last one is to be copied, (from, to), before the next step. Where there
        is no block for it, the new sequence waits and is computed again."""
        order = parent.order._replace(choice=choice)
        stream = Stream(order, parent.priority, parent.deadline, list(parent.tokens), parent.salt)
        self.streams[stream.name] = stream
        full, rest = divmod(parent.computed, BLOCK)
        room = parent.running and len(self.running) < self.limits.running and self.pool.available >= bool(rest)
        if not room:
            heapq.heappush(self.waiting, stream)
            return stream, None
        for block in parent.blocks[:full]:
            self.pool.hold(block)
        stream.blocks, stream.keys, stream.published = parent.blocks[:full], parent.keys[:full], full
        copy = None
        if rest:
            stream.blocks.append(self.pool.take())
            copy = (parent.blocks[full], stream.blocks[full])
        stream.computed, stream.running = parent.computed, True
        insort(self.running, stream)
        return stream, copy

    def append(self, stream: Stream, tokens: Sequence[int]) -> None:
        """The tokens chosen after a step: all but the last were in its draft, and are in the cache."""
        stream.tokens += tokens
        stream.draft = []
        if stream.running and len(tokens) > 1:
            stream.computed = len(stream.tokens) - 1

    def end(self, stream: Stream) -> None:
        """It has ended, or nobody waits for it any more."""
        del self.streams[stream.name]
        if stream.running:
            self.running.remove(stream)
            self._release(stream)
        else:
            self.waiting.remove(stream)
            heapq.heapify(self.waiting)

    def of_request(self, request: int) -> list[Stream]:
        return [stream for stream in self.streams.values() if stream.order.request == request]

    def plan(self, now: float) -> Plan:
        """The next step: every stream that waits for a next token gets it, as far as the cache holds; then prompts come
        forward in order, as many rows as `Pace` allows. No slices: nothing to do until something is submitted."""
        expired = self._expire(now)
        slices = self._decodes()
        prompts = [stream for stream in self.running if len(stream.tokens) - stream.computed > 1]
        idle = not slices and not prompts
        while self.waiting and len(prompts) < PROMPTS_AT_ONCE:
            admitted = self._admit(slices, forced=idle and not prompts)
            if admitted is None:
                break
            prompts.append(admitted)
        prompts = sorted(stream for stream in prompts if stream.running)
        if prompts:
            slices += self._share_out(prompts, self.pace.prompt_rows(len(slices)))
        return Plan(slices, expired)

    def done(self, plan: Plan) -> None:
        """The step was carried out."""
        for stream, start, rows, _ in plan.slices:
            stream.computed = min(start + rows, len(stream.tokens))
            full = stream.computed // BLOCK
            if stream.published < full:
                self._name_blocks(stream, full)
                for at in range(stream.published, full):
                    self.pool.publish(stream.blocks[at], stream.keys[at])
                stream.published = full

    def _expire(self, now: float) -> list[int]:
        expired = []
        while self._deadlines and self._deadlines[0][0] < now:
            _, request = heapq.heappop(self._deadlines)
            late = [stream for stream in self.of_request(request) if stream.deadline < now]
            for stream in late:
                self.end(stream)
            if late:
                expired.append(request)
        return expired

    def _decodes(self) -> list[Slice]:
        slices: list[Slice] = []
        at = 0
        while at < len(self.running):  # its end moves forward when streams are put off
            stream = self.running[at]
            tokens = len(stream.tokens)
            if tokens - stream.computed == 1 and self._room(stream, tokens):
                count = 1
                if stream.draft:
                    while stream.draft and not self._reach(stream, tokens + len(stream.draft)):
                        stream.draft.pop()
                    count += len(stream.draft)
                slices.append(Slice(stream, stream.computed, count, count))
            at += 1
        return slices

    def _room(self, stream: Stream, tokens: int) -> bool:
        """Blocks up to this token, if need be those of the streams behind; False: put off itself."""
        while not self._reach(stream, tokens):
            last = self.running[-1]
            self._put_off(last)
            if last is stream:
                return False
        return True

    def _reach(self, stream: Stream, tokens: int) -> bool:
        while len(stream.blocks) * BLOCK < tokens:
            if not self.pool.available:
                return False
            stream.blocks.append(self.pool.take())
        return True

    def _share_out(self, prompts: Sequence[Stream], allowed: int) -> list[Slice]:
        """Rows for prompts, the one that needs the fewest first, so that short ones do not wait for a long one's end; a
        quarter is kept for the first in the order, so that each gets its turn. What nobody else takes is the first's.

        Who would compute the same block as somebody before it waits for it instead, and finds it in a later step."""
        for stream in prompts:
            self._catch_up(stream)
        left = {stream: len(stream.tokens) - stream.computed for stream in prompts}
        first, room = prompts[0], allowed
        kept = min(-(-allowed // 4), left[first])
        coming: set[bytes] = set()
        taken: dict[Stream, int] = {}
        for stream in sorted(prompts, key=left.__getitem__):
            kept = 0 if stream is first else kept
            ahead = stream.computed // BLOCK
            if ahead < len(stream.keys) and stream.keys[ahead] in coming:
                continue
            rows = min(left[stream], room - kept)
            if rows:
                taken[stream] = rows
                room -= rows
                coming.update(stream.keys[ahead : -(-(stream.computed + rows) // BLOCK)])
        if first in taken:
            taken[first] += min(left[first] - taken[first], room)
        return [
            Slice(stream, stream.computed, rows, int(stream.computed + rows == len(stream.tokens)))
            for stream, rows in taken.items()
        ]

    def _catch_up(self, stream: Stream) -> None:
        """Take over blocks that others have computed since it was admitted, in the place of its own empty ones."""
        while stream.computed % BLOCK == 0 and stream.computed + BLOCK < len(stream.tokens):
            at = stream.computed // BLOCK
            block = self.pool.find(stream.keys[at])
            if block is None:
                return
            self.pool.release(stream.blocks[at])
            self.pool.hold(block)
            stream.blocks[at] = block
            stream.computed += BLOCK
            stream.reused += BLOCK
            stream.published = at + 1

    def _admit(self, slices: list[Slice], forced: bool) -> Stream | None:
        """The first of those that wait, with blocks for all its tokens; None when it must wait on.

        Those of lower priority make room for it, and lose their part in this step. Room is left for those that run to
        grow, unless there is nothing else to do (``forced``): then whoever is behind makes room."""
        stream = self.waiting[0]
        self._reuse(stream)
        need = -(-len(stream.tokens) // BLOCK) - len(stream.blocks)
        while True:
            spare = 0 if forced else len(self.running)
            if len(self.running) < self.limits.running and self.pool.available >= need + spare:
                break
            last = self.running[-1] if self.running else None
            if last is None or last < stream or not (forced or last.priority < stream.priority):
                self._release(stream)
                return None
            slices[:] = [each for each in slices if each.stream is not last]
            self._put_off(last)
        heapq.heappop(self.waiting)
        stream.blocks += [self.pool.take() for _ in range(need)]
        stream.running = True
        insort(self.running, stream)
        return stream

    def _reuse(self, stream: Stream) -> None:
        """Hold what is known of its tokens; not all of them: the last one's logits are needed."""
        self._name_blocks(stream, (len(stream.tokens) - 1) // BLOCK)
        for key in stream.keys[: (len(stream.tokens) - 1) // BLOCK]:
            block = self.pool.find(key)
            if block is None:
                break
            self.pool.hold(block)
            stream.blocks.append(block)
        stream.published = len(stream.blocks)
        stream.computed = stream.reused = len(stream.blocks) * BLOCK

    def _name_blocks(self, stream: Stream, count: int) -> None:
        while len(stream.keys) < count:
            at = len(stream.keys)
            before = stream.keys[-1] if stream.keys else stream.salt
            stream.keys.append(block_key(before, stream.tokens[at * BLOCK : (at + 1) * BLOCK]))

    def _put_off(self, stream: Stream) -> None:
        self.preempted += 1
        self.running.remove(stream)
        self._release(stream)
        stream.draft = []
        heapq.heappush(self.waiting, stream)

    def _release(self, stream: Stream) -> None:
        for block in reversed(stream.blocks):  # so that of a kept prefix the end is given up first
            self.pool.release(block)
        stream.blocks, stream.published, stream.computed, stream.running = [], 0, 0, False
