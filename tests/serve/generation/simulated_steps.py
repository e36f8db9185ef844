"""A scheduler driven without a model: the "model" checks what a real one would rely on."""

from dataclasses import dataclass, field

from shoal.serve.generation.pace import Pace
from shoal.serve.generation.scheduler import Limits, Scheduler, Stream
from shoal.serve.generation.step import BLOCK


@dataclass
class Simulation:
    """Keeps what each cache slot holds, and checks every step against it: what a row reads was written by the same
    beginning of tokens, nobody writes where another reads, and each stream's rows come in order."""

    blocks: int
    limits: Limits = field(default_factory=lambda: Limits(running=4))
    pace: Pace = field(default_factory=lambda: Pace(4.0, 2.0, most=40))
    now: float = 0.0

    def __post_init__(self):
        self.scheduler = Scheduler(self.blocks, self.limits, self.pace)
        self.slots: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}
        self.left: dict[tuple[int, int], int] = {}  # tokens still to come
        self.ended: list[tuple[int, int]] = []
        self.expired: list[int] = []
        self.rows: list[int] = []
        self.first_step: dict[tuple[int, int], int] = {}

    def submit(self, request: int, tokens: list[int], most: int, **facts) -> Stream | None:
        if self.scheduler.refusal(len(tokens) + most, 1):
            return None
        stream = self.scheduler.submit(request, tokens, self.now, **facts)
        self.left[stream.name] = most
        return stream

    def fork(self, parent: Stream, choice: int) -> Stream:
        stream, copy = self.scheduler.fork(parent, choice)
        if copy:
            for slot in range(BLOCK):
                if (copy[0], slot) in self.slots:
                    self.slots[copy[1], slot] = self.slots[copy[0], slot]
        self.left[stream.name] = self.left[parent.name]
        return stream

    def step(self) -> bool:
        """False when there was nothing to do."""
        self.now += 1.0
        plan = self.scheduler.plan(self.now)
        self.expired += plan.expired
        self.check()
        if not plan.slices:
            return False
        self.rows.append(sum(each.rows for each in plan.slices))
        written: set[tuple[int, int]] = set()
        for stream, start, rows, _ in plan.slices:
            self.first_step.setdefault(stream.name, len(self.rows))
            assert start == stream.computed, "a row was left out or computed twice"
            tokens = stream.tokens + stream.draft
            assert start + rows <= len(tokens)
            for place in range(start, start + rows):
                slot = (stream.blocks[place // BLOCK], place % BLOCK)
                assert slot not in written, "two streams write to one place"
                written.add(slot)
                self.slots[slot] = stream.salt, tuple(tokens[: place + 1])
        for stream, start, rows, _ in plan.slices:
            tokens = stream.tokens + stream.draft
            for place in range(start + rows):
                held = self.slots[stream.blocks[place // BLOCK], place % BLOCK]
                assert held == (stream.salt, tuple(tokens[: place + 1])), "a row reads what is not its own past"
        assert len({id(each.stream) for each in plan.slices}) == len(plan.slices), "a stream is in a step twice"
        self.scheduler.done(plan)
        for stream, _, _, wants in plan.slices:
            if wants:
                self.chosen(stream)
        self.check()
        return True

    def chosen(self, stream: Stream) -> None:
        """The next token depends on all before it, as a model's does."""
        self.left[stream.name] -= 1
        if self.left[stream.name] == 0:
            self.ended.append(stream.name)
            self.scheduler.end(stream)
        else:
            self.scheduler.append(stream, [sum(stream.tokens) * 31 % 1009])

    def check(self) -> None:
        self.scheduler.pool.check([stream.blocks for stream in self.scheduler.streams.values()])
        assert self.scheduler.running == sorted(self.scheduler.running)
        assert len(self.scheduler.running) <= self.limits.running
        assert len(self.scheduler.running) + len(self.scheduler.waiting) == len(self.scheduler.streams)

    def run(self, most_steps: int = 2000) -> None:
        for _ in range(most_steps):
            if not self.step():
                return
        raise AssertionError("it does not come to an end")
