"""Continuous batching: requests join and leave at every step of a model that has a paged cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from shoal.serve.generation.beams import BeamSearch
from shoal.serve.generation.checks import problem
from shoal.serve.generation.drafts import Drafts, Wish
from shoal.serve.generation.messages import Ask, Outcome, Piece, Scored
from shoal.serve.generation.pace import Pace
from shoal.serve.generation.sampling import Chooser
from shoal.serve.generation.scheduler import Limits, Plan, Scheduler, Slice, Stream
from shoal.serve.generation.step import Cache, Floats, Rows, Step


class Refused(Exception):
    """A request that cannot be served as it is; the message is one line."""


class Told(NamedTuple):
    """What a step brought for a request: pieces, and, when it has ended, its outcome or why it was given up."""

    request: int
    pieces: list[Piece]
    outcome: Outcome | None = None
    expired: bool = False


@dataclass
class _Open:
    ask: Ask
    choosers: dict[int, Chooser]
    ended: int = 0  # choices
    reused: int = -1
    beams: BeamSearch | None = None
    lineup: list[Stream] = field(default_factory=list)  # the streams of its beams, the best first
    last: int = 0  # number of a beam's stream that was used last
    rows: dict[int, Floats] = field(
        default_factory=dict
    )  # the logits of each beam, by its stream's number, as they come


@dataclass
class Counts:
    """Since the start."""

    steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class Generations:
    """All that is generated at the moment with one cache, between the steps of a model. Belongs to one thread."""

    def __init__(
        self, cache: Cache, pace: Pace, limits: Limits | None = None, drafts: Drafts | None = None, drafted: int = 4
    ) -> None:
        self.cache = cache
        self.scheduler = Scheduler(cache.blocks, limits or Limits(), pace)
        self.counts = Counts()
        self._plan: Plan | None = None  # of the step that has begun
        self._drafts, self._drafted = drafts, drafted
        self._open: dict[int, _Open] = {}

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def requests(self) -> frozenset[int]:
        """Those that are open."""
        return frozenset(self._open)

    def add(
        self,
        request: int,
        ask: Ask,
        *,
        arrived: float = 0.0,
        deadline: float = float("inf"),
        priority: int = 0,
        client: str = "",
        reached: Sequence[Sequence[Piece]] = (),
    ) -> list[Told]:
        """A request joins. ``reached``: pieces told before by a process that has died; the request goes on from there.

        Requests of one ``client`` share prefixes of the cache. Raises Refused. What it gives is for a request of which
        everything has been told already."""
        why = problem(ask, self.cache.vocab, self.cache.context)
        choices = ask.beams or ask.choices
        why = why or self.scheduler.refusal(len(ask.tokens) + ask.most, choices)
        if why:
            raise Refused(why)
        opened = _Open(ask, {}, beams=BeamSearch(ask) if ask.beams else None)
        self._open[request] = opened
        self.counts.prompt_tokens += len(ask.tokens)
        facts = {"priority": priority, "deadline": deadline, "salt": client.encode()}
        if not reached:
            opened.choosers[0] = Chooser(ask, 0)
            self.scheduler.submit(request, ask.tokens, arrived, **facts)  # type: ignore[arg-type]
            return []
        for choice in range(ask.choices):  # what each had is part of its prompt now; equal beginnings are shared
            chooser = opened.choosers[choice] = Chooser(ask, choice)
            had = [piece for pieces in reached for piece in pieces if piece.choice == choice]
            tokens = [token for piece in had for token in piece.tokens]
            for token in tokens:
                chooser.take(token)
            if had and had[-1].reason:
                opened.ended += 1
            else:
                self.scheduler.submit(request, [*ask.tokens, *tokens], arrived, choice=choice, **facts)  # type: ignore[arg-type]
        return [self._closed(request, opened, [])] if opened.ended == ask.choices else []

    def cancel(self, request: int) -> None:
        """Nobody waits for it any more. Unknown requests are ignored."""
        if self._open.pop(request, None):
            for stream in self.scheduler.of_request(request):
                self.scheduler.end(stream)

    def begin(self, now: float = 0.0) -> tuple[list[Told], Rows | None]:
        """What has expired, and the rows of the next step; None: there are none. Its logits are for `finish`, and
        nothing else than `add` may be called before."""
        if self._drafts:
            self._guess(self._drafts)
        plan = self.scheduler.plan(now)
        told = [Told(request, [], expired=True) for request in plan.expired if self._open.pop(request, None)]
        if not plan.slices:
            return told, None
        rows = _rows(plan)
        self.counts.steps += 1
        self.counts.rows += len(rows.tokens)
        self._plan = plan
        return told, rows

    @property
    def in_step(self) -> frozenset[int]:
        """The requests whose rows are in the step that has begun."""
        return frozenset([each.stream.order.request for each in self._plan.slices] if self._plan else [])

    def finish(self, logits: Floats) -> list[Told]:
        """What a step brought."""
        plan, self._plan = self._plan, None
        assert plan is not None
        self.scheduler.done(plan)
        return self._chosen(plan.slices, logits)

    def give_up(self) -> None:
        """The step that has begun will bring nothing: its requests are to be cancelled."""
        self._plan = None

    def _guess(self, drafts: Drafts) -> None:
        wishes = []
        streams = []
        for stream in self.scheduler.running:
            opened = self._open[stream.order.request]
            if len(stream.tokens) - stream.computed != 1 or opened.beams:
                continue
            room = opened.ask.most - opened.choosers[stream.order.choice].index - 1
            if room > 0:
                wishes.append(Wish(stream.name, stream.tokens, min(self._drafted, room)))
                streams.append(stream)
        if wishes:
            for stream, guesses in zip(streams, drafts.guess(wishes, self.scheduler.streams), strict=True):
                stream.draft = guesses
                self.counts.drafted += len(guesses)

    def _chosen(self, slices: Sequence[Slice], logits: Floats) -> list[Told]:
        pieces: dict[int, list[Piece]] = {}
        wanted = [each for each in slices if each.wants]
        likeliest = self._likeliest(wanted, logits)
        searching: dict[int, None] = {}  # in order
        at = 0
        for stream, _, _, wants in wanted:
            request, choice = stream.order.request, stream.order.choice
            opened = self._open[request]
            if opened.reused < 0:
                opened.reused = min(stream.reused, len(opened.ask.tokens))
                self.counts.reused_tokens += opened.reused
            if opened.beams:
                opened.rows[choice] = logits[at].copy()
                searching[request] = None
            else:
                block = logits[at : at + wants]
                first = len(opened.choosers) == 1 < opened.ask.choices
                others = self._others(request, opened, stream) if first else []
                for each in (stream, *others):
                    piece = self._next(opened, each, block, likeliest[at : at + wants])
                    pieces.setdefault(request, []).append(piece)
            at += wants
        told = []
        for request, found in pieces.items():
            opened = self._open[request]
            told.append(
                self._closed(request, opened, found) if opened.ended == opened.ask.choices else Told(request, found)
            )
        return told + [each for request in searching for each in self._search(request)]

    def _likeliest(self, wanted: Sequence[Slice], logits: Floats) -> list[int]:
        """Of every row the token with the largest logit, in one call, where somebody takes just that."""
        if any(self._open[s.stream.order.request].ask.temperature == 0 for s in wanted):
            return logits.argmax(axis=1).tolist()  # type: ignore[no-any-return]
        return [0] * len(logits)

    def _others(self, request: int, opened: _Open, stream: Stream) -> list[Stream]:
        """The other choices begin where the first has its prompt done."""
        others = []
        for choice in range(1, opened.ask.choices):
            opened.choosers[choice] = Chooser(opened.ask, choice)
            others.append(self._fork(stream, choice))
        return others

    def _fork(self, stream: Stream, choice: int) -> Stream:
        other, copy = self.scheduler.fork(stream, choice)
        if copy:
            self.cache.copy(*copy)
        return other

    def _next(self, opened: _Open, stream: Stream, rows: Floats, likeliest: Sequence[int]) -> Piece:
        """The tokens after a stream's last: one, and one more for each guess of the draft that was right."""
        ask, chooser = opened.ask, opened.choosers[stream.order.choice]
        tokens: list[int] = []
        scores: list[Scored] | None = [] if ask.logprobs >= 0 else None
        draft = stream.draft
        reason = ""
        for place in range(len(rows)):
            if chooser.greedy:
                token, score = likeliest[place], None
            else:
                token, score = chooser.choose(rows[place])
            chooser.take(token)
            tokens.append(token)
            if scores is not None and score is not None:
                scores.append(score)
            reason = "stop" if token in ask.ends else "length" if chooser.index == ask.most else ""
            if reason or place == len(draft) or draft[place] != token:
                break
        self.counts.tokens += len(tokens)
        self.counts.accepted += len(tokens) - 1
        if reason:
            opened.ended += 1
            self.scheduler.end(stream)
        else:
            self.scheduler.append(stream, tokens)
        return Piece(stream.order.choice, tokens, scores, reason)

    def _closed(self, request: int, opened: _Open, pieces: list[Piece]) -> Told:
        del self._open[request]
        generated = sum(chooser.index for chooser in opened.choosers.values())
        return Told(request, pieces, Outcome(len(opened.ask.tokens), max(opened.reused, 0), generated))

    def _search(self, request: int) -> list[Told]:
        """A turn of beam search, once the logits of all its beams are there."""
        opened = self._open[request]
        search = opened.beams
        assert search is not None
        opened.lineup = opened.lineup or self.scheduler.of_request(request)
        if len(opened.rows) < len(opened.lineup):
            return []
        beams = search.advance([opened.rows[stream.order.choice] for stream in opened.lineup])
        opened.rows.clear()
        self.counts.tokens += len(beams) or len(opened.lineup)
        if not beams:
            for stream in opened.lineup:
                self.scheduler.end(stream)
            del self._open[request]
            return [_found(request, opened, search)]
        for parent in set(range(len(opened.lineup))) - {beam.parent for beam in beams}:
            self.scheduler.end(opened.lineup[parent])  # before the forks, which may need its blocks
        lineup: list[Stream] = []
        for beam in beams:
            stream = opened.lineup[beam.parent]
            if stream in lineup:  # an earlier beam goes on in its place
                opened.last += 1
                stream = self._fork(stream, opened.last)
            lineup.append(stream)
        for stream, beam in zip(lineup, beams, strict=True):
            self.scheduler.append(stream, [beam.token])
        opened.lineup = lineup
        return []


class Generator(Generations):
    """One model in this process, and all that is generated with it."""

    def __init__(
        self, step: Step, pace: Pace, limits: Limits | None = None, drafts: Drafts | None = None, drafted: int = 4
    ) -> None:
        super().__init__(step, pace, limits, drafts, drafted)
        self.step = step
        self.step_s = 0.0  # in the model's step, since somebody set it to 0

    def work(self, now: float = 0.0, begin: Callable[[frozenset[int]], None] | None = None) -> list[Told]:
        """One step, and what it brought. ``begin`` is told, ahead of it, whose requests it is for."""
        told, rows = self.begin(now)
        if rows is None:
            return told
        if begin:
            begin(self.in_step)
        begun = time.perf_counter()
        logits = self.step.run(rows)
        self.step_s += time.perf_counter() - begun
        return told + self.finish(logits)


def _found(request: int, opened: _Open, search: BeamSearch) -> Told:
    best = search.best()
    pieces = [Piece(choice, list(each.tokens), None, each.reason) for choice, each in enumerate(best)]
    generated = sum(len(each.tokens) for each in best)
    scores = [each.score for each in best]
    return Told(request, pieces, Outcome(len(opened.ask.tokens), opened.reused, generated, scores))


def _rows(plan: Plan) -> Rows:
    tokens: list[int] = []
    places: list[int] = []
    sequences: list[int] = []
    wants: list[int] = []
    tables = np.zeros((len(plan.slices), max(len(s.stream.blocks) for s in plan.slices)), np.int32)
    for number, (stream, start, count, wanted) in enumerate(plan.slices):
        tables[number, : len(stream.blocks)] = stream.blocks
        if count == 1:
            tokens.append(stream.tokens[start])
            places.append(start)
            sequences.append(number)
        else:
            tokens += stream.tokens[start : start + count]
            tokens += stream.draft[: start + count - len(stream.tokens)] if stream.draft else ()
            places += range(start, start + count)
            sequences += [number] * count
        wants += range(len(tokens) - wanted, len(tokens))
    columns = [np.array(column, np.int64) for column in (tokens, places, sequences, wants)]
    return Rows(columns[0], columns[1], columns[2], tables, columns[3])
