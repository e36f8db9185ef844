"""Beam search: the arithmetic on beams and scores, without a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from shoal.serve.generation.messages import Ask
from shoal.serve.generation.sampling import log_probabilities
from shoal.serve.generation.step import Floats


class Beam(NamedTuple):
    parent: int  # which of the beams before it goes on
    token: int
    total: float  # log-probability of the answer so far


class Ended(NamedTuple):
    score: float
    tokens: tuple[int, ...]
    reason: str


@dataclass
class BeamSearch:
    """Decides which beams go on. At every turn the 2 x beams best continuations of all beams are looked at, so that
    ``beams`` are left even if as many end (as in ``transformers``)."""

    ask: Ask
    totals: list[float] = field(default_factory=lambda: [0.0])
    answers: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    ended: list[Ended] = field(default_factory=list)  # best first, at most ``beams``
    finished: bool = False

    def advance(self, logits: Sequence[Floats]) -> list[Beam]:
        """From the logits of every beam, in order, those that go on; none when the search has ended."""
        ask = self.ask
        rows = np.stack(
            [log_probabilities(row) + np.float32(total) for row, total in zip(logits, self.totals, strict=True)]
        )
        vocab = rows.shape[1]
        length = len(self.answers[0]) + 1
        if length <= ask.least and ask.ends:
            rows[:, ask.ends] = -np.inf
        flat = rows.reshape(-1)
        wide = min(len(flat), ask.beams * max(2, 1 + len(set(ask.ends))))
        top = np.argpartition(flat, len(flat) - wide)[len(flat) - wide :]
        top = top[np.lexsort((top, -flat[top]))]
        on: list[Beam] = []
        for rank, at in enumerate(top.tolist()):
            parent, token = divmod(at, vocab)
            total = float(flat[at])
            if token in ask.ends or length == ask.most:
                if rank < ask.beams:
                    reason = "stop" if token in ask.ends else "length"
                    self._end(total, (*self.answers[parent], token), reason)
            elif len(on) < ask.beams:
                on.append(Beam(parent, token, total))
        self.answers = [(*self.answers[beam.parent], beam.token) for beam in on]
        self.totals = [beam.total for beam in on]
        if length == ask.most:
            self.finished = True
        elif len(self.ended) == ask.beams:
            best = max(self.totals) / length**ask.length_penalty
            self.finished = ask.early or self.ended[-1].score >= best
        return [] if self.finished else on

    def _end(self, total: float, tokens: tuple[int, ...], reason: str) -> None:
        self.ended.append(Ended(total / len(tokens) ** self.ask.length_penalty, tokens, reason))
        self.ended.sort(key=lambda each: -each.score)  # stable: of equal ones the earlier first
        del self.ended[self.ask.beams :]

    def best(self) -> list[Ended]:
        return self.ended[: self.ask.choices]
