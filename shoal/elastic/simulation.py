"""The decider under faults that a seed draws: a virtual clock, and workers that can die between any two of their words.

A simulated worker does what a real one does, word by word: it offers what it has kept of a step that was cut short,
computes its shards, posts them to every other one, waits for theirs, says that it is done, and updates when all are.
Each word leaves at a moment of its own and takes a time of its own; words between two workers keep their order, and a
worker that dies has reached some of the others and not the rest. What a worker holds is the list of the steps that it
has applied, each with the shards that went in: one that was applied twice, or made of a shard twice, shows at once.
"""

import heapq
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

from shoal.comm.dealt import DealtPlacement, deal
from shoal.comm.exchange import Placement
from shoal.comm.tree import Node
from shoal.elastic import membership as m
from shoal.elastic.simulated_sums import Memory, Part, usual
from shoal.elastic.simulated_worker import Applied, SimWorker, Word

SENDING_S = (0.0, 0.0005)  # from the decision to say something to the moment when a word leaves
WORD_S = (0.0001, 0.003)  # how long it is on its way
COMPUTE_S = (0.01, 0.05)  # a worker's own part of a step
BUILD_S = (0.4, 0.9)
NOTICE_S = (0.001, 0.02)  # from a death to the agent's knowledge of it
HANG_NOTICE_S = 2.0
STOPPED_LOOK_S = 0.05  # how often a stopped worker's next move is tried again
GIVES_UP_S = 300.0  # of virtual time without an end: the decider is stuck


class Wrong(AssertionError):
    """An invariant does not hold; the message ends with the seed."""


@dataclass(frozen=True)
class Outcome:
    seed: int
    ended: str  # "finished", or why the run gave up
    epochs: int
    lost: int
    seconds: float  # of virtual time
    kept: int = 0  # shards of lost steps that were not computed again


class Simulation:
    """One run under one schedule of faults. ``run`` raises Wrong when an invariant does not hold."""

    by_shards = True  # a worker may be interrupted after each of its shards

    def __init__(self, seed: int, *, workers: int = 4, shards: int = 8, steps: int = 40) -> None:
        self.seed, self.shards, self.steps = seed, shards, steps
        self.random = random.Random(seed)
        self.now = 0.0
        self.membership = m.Membership(workers, self.random.choice((1, 1, 2, workers)), shards)
        self.workers: dict[int, SimWorker] = {}
        self.log: list[tuple[int, int]] = []  # (step, epoch), as told by the rank 0 of that epoch
        self.disk: list[Applied] = []  # the newest checkpoint
        self.epochs: list[int] = []
        self.passes = (1,) * shards
        self.memories: dict[int, Memory] = defaultdict(Memory)  # by epoch
        self.kept = 0  # shards that were not computed again
        self.broken = self.asked = False
        self.ended = ""
        self.lost = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._last: dict[tuple[int, int], float] = defaultdict(float)  # when the last word between two seats arrives

    def run(self) -> Outcome:
        self._do(self.membership.begin(self.now))
        self._plan_faults()
        while not self.ended:
            if not self._queue or self.now > GIVES_UP_S:
                self._wrong(f"nothing happens any more: {self.membership}")
            self._next()
        self._check_log()
        return Outcome(self.seed, self.ended, len(self.epochs), self.lost, self.now, self.kept)

    def _next(self) -> None:
        self.now, _, act = heapq.heappop(self._queue)
        act()

    def _at(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._order), act))

    def _in(self, bounds: tuple[float, float], act: Callable[[], None]) -> None:
        self._at(self.random.uniform(*bounds), act)

    def _wrong(self, what: str) -> None:
        raise Wrong(f"{what} (at {self.now:.4f} s, seed {self.seed})")

    # --- faults -----------------------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        """Kills, stops, thaws, resizes and drains, singly and in bursts, at any time of the run."""
        at = self.random.uniform(0.0, 2.0)
        kinds = (
            self._kill_one,
            self._kill_one,
            self._kill_one,
            self._stop_one,
            self._resize,
            self._drain,
            self._kill_all,
        )
        for _ in range(self.random.randrange(2, 16)):
            at += self.random.choice((self.random.uniform(0, 0.02), self.random.uniform(0, 0.4)))
            self._at(at, self.random.choice(kinds))

    def _someone(self) -> SimWorker | None:
        living = [w for w in self.workers.values() if w.alive]
        return self.random.choice(living) if living else None

    def _kill_one(self) -> None:
        if worker := self._someone():
            self._kill(worker)

    def _kill_all(self) -> None:
        if self.random.random() < 0.3:
            for worker in list(self.workers.values()):
                self._kill(worker)

    def _stop_one(self) -> None:
        worker = self._someone()
        if worker is None or worker.stopped:
            return
        worker.stopped = True
        self._at(HANG_NOTICE_S, partial(self._suspect, worker))
        if self.random.random() < 0.5:
            self._in((0.0, 2 * HANG_NOTICE_S), partial(self._thaw, worker))

    def _suspect(self, worker: SimWorker) -> None:
        if worker.alive and worker.stopped:
            self._tell(m.Suspect(worker.seat, "no progress"))

    def _thaw(self, worker: SimWorker) -> None:
        worker.stopped = False
        self._progress(worker)

    def _resize(self) -> None:
        self._tell(m.Resize(self.random.randrange(1, self.shards + 1), "asked"))

    def _drain(self) -> None:
        if worker := self._someone():
            self._tell(m.Drain(worker.seat, "asked to leave"))

    def _kill(self, worker: SimWorker) -> None:
        if worker.alive:
            self.lost += 1
            self._hang_up(worker)
            self._end(worker, "killed by SIGKILL")

    def _end(self, worker: SimWorker, why: str) -> None:
        worker.alive, worker.died_s = False, self.now
        self._in(NOTICE_S, partial(self._buried, worker, why))

    def _buried(self, worker: SimWorker, why: str) -> None:
        del self.workers[worker.seat]
        self._tell(m.Dead(worker.seat, why))

    # --- the agent --------------------------------------------------------------------------------------------

    def _tell(self, event: m.Event) -> None:
        self._do(self.membership.on(event, self.now))

    def _do(self, instructions: list[m.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case m.Fork(seat):
                    worker = self.workers[seat] = SimWorker(seat)
                    self._in(BUILD_S, partial(self._built, worker))
                case m.Kill(seat):
                    if seat in self.workers:
                        self._kill(self.workers[seat])
                case m.Release(seat):
                    if seat in self.workers:
                        self._in(WORD_S, partial(self._release, self.workers[seat]))
                case m.Break():
                    self.broken = True
                    for worker in list(self.workers.values()):
                        self._in(COMPUTE_S, partial(self._progress, worker))
                case m.Ask():
                    self.asked = True
                case m.Form():
                    self._form(instruction)
                case m.GiveUp(why):
                    self.ended = why
                case m.Tell() | m.Finish():
                    pass

    def _built(self, worker: SimWorker) -> None:
        if worker.stopped:
            self._at(STOPPED_LOOK_S, partial(self._built, worker))
        elif worker.alive:
            self._tell(m.Opened(worker.seat))
            self._tell(m.Ready(worker.seat))

    def _release(self, worker: SimWorker) -> None:
        if worker.alive:
            self._end(worker, "")

    def _form(self, form: m.Form) -> None:
        """What must hold whenever an epoch begins."""
        if self.epochs and form.epoch <= self.epochs[-1]:
            self._wrong(f"epoch {form.epoch} comes after epoch {self.epochs[-1]}")
        inside = [w.seat for w in self.workers.values() if w.alive and w.epoch]
        if inside:
            self._wrong(f"epoch {form.epoch} begins while seats {inside} are in epoch {self.epochs[-1]}")
        ahead = [w.seat for w in self.workers.values() if w.alive and w.step > max(form.steps)]
        if ahead:
            self._wrong(f"epoch {form.epoch} begins at step {max(form.steps)}, and seats {ahead} hold a newer one")
        self.epochs.append(form.epoch)
        self.broken = self.asked = False
        for rank, seat in enumerate(form.seats):
            if seat in self.workers:
                self._in(WORD_S, partial(self._join, self.workers[seat], form, rank))

    # --- workers ----------------------------------------------------------------------------------------------

    def _join(self, worker: SimWorker, form: m.Form, rank: int) -> None:
        if not worker.alive:
            return
        if worker.stopped:
            self._at(STOPPED_LOOK_S, partial(self._join, worker, form, rank))
            return
        worker.epoch = worker.joined = form.epoch
        worker.form, worker.rank = form, rank
        worker.posted = worker.reduced = False
        if form.cold:
            worker.state = list(self.disk)
        elif worker.step < max(form.steps):
            donor = self.workers.get(form.seats[form.donor])
            if donor is None or not donor.alive or donor.state is None:
                self._leave(worker)
                return
            if worker.state is not None and max(form.steps) > worker.step + 1:
                self._wrong(f"survivor {worker.seat} is {max(form.steps) - worker.step} steps behind the others")
            worker.state = list(donor.state[: max(form.steps)])
        if rank == 0 and not self._may_commit(worker):
            self._leave(worker)
            return
        if rank == 0:  # what the rank 0 before it has not told
            last = max((step for step, _ in self.log), default=0)
            self.log += [(step, form.epoch) for step in range(last + 1, worker.step + 1)]
        if form.epoch in worker.widowed:
            self._leave(worker)
        else:
            self._offer(worker)

    def _kept(self, part: Part) -> list[Node]:
        """What a survivor brings to the step."""
        return part.kept()

    def _offer(self, worker: SimWorker) -> None:
        part, nodes = worker.part, []
        if part is not None and part.step == worker.step:
            nodes = self._kept(part)
            if part.torn() & set(nodes):
                self._wrong(f"seat {worker.seat} keeps sums of step {worker.step + 1} that others have added to")
        worker.offering, worker.offers = True, {worker.rank: tuple(nodes)}
        self._say(worker, "offer", tuple(nodes))
        self._hear_early(worker)

    def _hear_early(self, worker: SimWorker) -> None:
        early, worker.early = worker.early, []
        for word in early:
            self._hear(worker.seat, word)

    def _begin_step(self, worker: SimWorker, dealt: Placement | None = None) -> None:
        assert worker.form is not None
        placement = dealt or usual(len(worker.form.seats), worker.rank, self.shards)
        worker.offering, worker.part = False, Part(worker.step, placement, self.memories[worker.epoch], self.passes)
        worker.posts, worker.dones = {worker.rank}, {worker.rank}
        worker.posted = worker.reduced = False
        worker.changes = worker.change_seen = self._asked_of(worker)
        if worker.step >= self.steps:  # the barrier at the end of a run
            worker.posted = worker.reduced = True
            self._say(worker, "done")
        else:
            self._compute(worker)
        self._hear_early(worker)

    def _compute(self, worker: SimWorker) -> None:
        """The next shard; afterwards it looks at what others say."""
        assert worker.part is not None
        takes = self.random.uniform(*COMPUTE_S) / (max(1, len(worker.part.placement.leaves)) if self.by_shards else 1)
        self._at(takes, partial(self._computed, worker, worker.epoch, worker.step))

    def _computed(self, worker: SimWorker, epoch: int, step: int) -> None:
        if not worker.alive or (worker.epoch, worker.step) != (epoch, step):
            return
        if worker.stopped:
            self._at(STOPPED_LOOK_S, partial(self._computed, worker, epoch, step))
            return
        part = worker.part
        assert part is not None
        part.done = min(part.done + 1, len(part.placement.leaves)) if self.by_shards else len(part.placement.leaves)
        if part.done < len(part.placement.leaves):
            self._compute(worker)
            self._progress(worker)
            return
        worker.posted = True
        part.post()
        self._say(worker, "post")

    def _say(self, worker: SimWorker, what: str, nodes: tuple[Node, ...] = ()) -> None:
        """To all others of the epoch; a death in between reaches some of them only."""
        assert worker.form is not None
        word = Word(worker.epoch, worker.step, worker.rank, what, worker.changes, nodes)
        for seat in worker.form.seats:
            if seat != worker.seat:
                sent = self.now + self.random.uniform(*SENDING_S)
                self._at(self._arrival(worker, seat, sent) - self.now, partial(self._deliver, worker, seat, word, sent))
        self._progress(worker)

    def _arrival(self, worker: SimWorker, seat: int, sent: float) -> float:
        arrives = max(sent + self.random.uniform(*WORD_S), self._last[worker.seat, seat] + 1e-9)
        self._last[worker.seat, seat] = arrives
        return arrives

    def _deliver(self, sender: SimWorker, seat: int, word: Word, sent: float) -> None:
        if sender.died_s >= sent:
            self._hear(seat, word)

    def _hear(self, seat: int, word: Word) -> None:
        worker = self.workers.get(seat)
        if worker is None or not worker.alive:
            return
        here = (word.epoch, word.step) == (worker.epoch, worker.step)
        if here and word.what == "offer":
            worker.offers[word.rank] = word.nodes
            self._progress(worker)
        elif here and not worker.offering:
            (worker.posts if word.what == "post" else worker.dones).add(word.rank)
            worker.change_seen |= word.changes and word.what == "post"
            self._progress(worker)
        elif word.epoch > worker.joined or word.epoch == worker.epoch:
            worker.early.append(word)

    def _asked_of(self, worker: SimWorker) -> bool:
        """Whether it sees that others are to go on after the step."""
        return self.asked

    def _broken_for(self, worker: SimWorker) -> bool:
        """Whether it sees that its epoch is over."""
        return self.broken

    def _may_commit(self, worker: SimWorker) -> bool:
        """Whether what it does now can count."""
        return True

    def _complete(self, worker: SimWorker) -> bool:
        return worker.form is not None and worker.reduced and worker.dones == set(range(len(worker.form.seats)))

    def _progress(self, worker: SimWorker) -> None:
        """What a worker can do with what it has heard."""
        if not worker.alive or worker.stopped or worker.form is None:
            return
        if self._complete(worker) and self._may_commit(worker):
            self._commit(worker)
        elif self._complete(worker) or self._broken_for(worker):
            self._leave(worker)
        elif worker.offering and len(worker.offers) == len(worker.form.seats):
            self._deal(worker)
        elif worker.posted and not worker.reduced and worker.posts == set(range(len(worker.form.seats))):
            worker.reduced = True
            if worker.part is not None:
                worker.part.memory.reduced.add(worker.step)
            self._say(worker, "done")

    def _deal(self, worker: SimWorker) -> None:
        """What nobody has kept is computed, by all evenly."""
        brings, computes = deal([worker.offers[rank] for rank in sorted(worker.offers)], self.passes)
        if worker.rank == 0:
            self.kept += self.shards - sum(map(len, computes))
        whole = brings[0] or computes[0]
        self._begin_step(worker, DealtPlacement(brings, computes, worker.rank) if any(brings) and whole else None)

    def _commit(self, worker: SimWorker) -> None:
        assert worker.form is not None
        assert worker.state is not None
        if worker.step >= self.steps:
            self._finish(worker)
            return
        step = worker.step + 1
        assert worker.part is not None
        worker.state.append((step, worker.part.shards()))
        if worker.rank == 0:
            if step > max((s for s, _ in self.log), default=0):
                self.log.append((step, worker.epoch))
            if step % 10 == 0:
                self.disk = list(worker.state)
        self._tell(m.Went(worker.seat, worker.epoch, step))
        if worker.change_seen and step < self.steps:
            self._leave(worker)
        else:
            self._begin_step(worker)

    def _check_state(self, worker: SimWorker) -> None:
        wanted = [(step, tuple(range(self.shards))) for step in range(1, self.steps + 1)]
        if worker.state != wanted:
            self._wrong(f"seat {worker.seat} ends with {worker.state}")

    def _finish(self, worker: SimWorker) -> None:
        self._check_state(worker)
        worker.epoch, worker.form = 0, None
        self.ended = "finished"
        self._tell(m.Done(worker.seat))

    def _hang_up(self, worker: SimWorker) -> None:
        """All others of the epoch find out, after what this worker has said before."""
        for seat in worker.form.seats if worker.form else ():
            if seat != worker.seat:
                arrives = self._arrival(worker, seat, self.now + SENDING_S[1])
                self._at(arrives - self.now, partial(self._hung_up, worker, seat, worker.epoch))

    def _hung_up(self, origin: SimWorker, seat: int, epoch: int) -> None:
        self._peer_lost(seat, epoch)

    def _peer_lost(self, seat: int, epoch: int) -> None:
        worker = self.workers.get(seat)
        if worker is None or not worker.alive:
            return
        worker.widowed.add(epoch)
        if worker.epoch == epoch and worker.stopped:
            self._at(STOPPED_LOOK_S, partial(self._peer_lost, seat, epoch))
        elif worker.epoch == epoch and not self._complete(worker):
            self._leave(worker)

    def _leave(self, worker: SimWorker) -> None:
        self._hang_up(worker)
        worker.epoch, worker.form = 0, None
        self._in(WORD_S, partial(self._left, worker, worker.step))

    def _left(self, worker: SimWorker, step: int) -> None:
        if worker.alive:
            self._tell(m.Left(worker.seat, step, False))

    # --- the end ----------------------------------------------------------------------------------------------

    def _check_log(self) -> None:
        steps = [step for step, _ in self.log]
        if steps != list(range(1, len(steps) + 1)) or (self.ended == "finished" and len(steps) != self.steps):
            self._wrong(f"the log has steps {steps}")
        if any(a > b for (_, a), (_, b) in zip(self.log, self.log[1:], strict=False)):
            self._wrong(f"an older epoch committed after a newer one: {self.log}")
