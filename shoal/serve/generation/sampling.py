"""From the logits of one row to the next token. What is drawn depends on these logits, the seed, the number of the
answer and the number of the token: on nothing that happened to other requests."""

import hashlib
import struct
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from shoal.serve.generation.messages import Ask, Scored
from shoal.serve.generation.step import Floats

PIECE = 256  # weights that are added up at a time


def uniform(seed: int, choice: int, index: int) -> float:
    """The draw in [0, 1) for a token: a hash of what counts, so that there is no state to carry or to lose."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed & (2**64 - 1), choice, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Chooser:
    """Chooses the tokens of one answer, in order."""

    def __init__(self, ask: Ask, choice: int) -> None:
        self.ask = ask
        self.choice = choice
        self.index = 0  # of the next token
        self.counts: Counter[int] = Counter()
        self._prompt = frozenset(ask.tokens) if ask.repetition != 1.0 else frozenset()
        self.plain = not (
            ask.repetition != 1.0 or ask.frequency or ask.presence or ask.bias or ask.logprobs >= 0 or ask.least
        )
        self.greedy = self.plain and ask.temperature == 0

    def take(self, token: int) -> None:
        """The token was chosen: by `choose`, or by somebody who knows what it would choose."""
        self.index += 1
        if not self.plain:
            self.counts[token] += 1

    def choose(self, logits: Floats) -> tuple[int, Scored | None]:
        """The next token from float32 [vocab], which is left as it is."""
        ask = self.ask
        changed = logits if self.plain else self._changed(logits)
        if ask.temperature == 0:
            token = int(changed.argmax())
        else:
            token = draw(changed, ask, uniform(ask.seed, self.choice, self.index))
        return token, scored(logits, token, ask.logprobs) if ask.logprobs >= 0 else None

    def _changed(self, logits: Floats) -> Floats:
        ask = self.ask
        changed = logits.copy()
        if ask.repetition != 1.0:
            seen = np.fromiter(self._prompt | self.counts.keys(), np.int64)
            values = changed[seen]
            changed[seen] = np.where(
                values > 0, values / np.float32(ask.repetition), values * np.float32(ask.repetition)
            )
        if self.counts and (ask.frequency or ask.presence):
            seen = np.fromiter(self.counts.keys(), np.int64)
            times = np.fromiter(self.counts.values(), np.float32)
            changed[seen] -= times * np.float32(ask.frequency) + np.float32(ask.presence)
        for token, value in ask.bias.items():
            changed[token] += np.float32(value)
        if self.index < ask.least:
            changed[ask.ends] = -np.inf
        return changed


def draw(logits: Floats, ask: Ask, at: float) -> int:
    """The token whose part of the line from 0 to 1 holds ``at``, among those that top_k, top_p and min_p leave.

    As they are applied in ``transformers``: temperature first, then top_k, top_p and min_p, each on what is left."""
    kept = _top(logits, ask.top_k) if 0 < ask.top_k < len(logits) else None
    logs = logits - logits.max() if kept is None else logits[kept] - logits[kept[0]]
    logs *= np.float32(1 / ask.temperature)
    weights = np.exp(logs)
    if ask.top_p < 1.0:
        left = _nucleus(weights, ask.top_p)
        weights, kept = weights[left], left if kept is None else kept[left]
    if ask.min_p > 0.0:
        left = np.flatnonzero(weights >= ask.min_p)  # the largest is 1
        weights, kept = weights[left], left if kept is None else kept[left]
    place = _placed(weights, at)
    return place if kept is None else int(kept[place])


def _placed(weights: Floats, at: float) -> int:
    """The first place up to which the weights' sum is more than the share ``at`` of all; PIECE of them at a time."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), PIECE), dtype=np.float64)
    line = np.cumsum(sums)
    target = at * line[-1]
    piece = min(int(np.searchsorted(line, target, side="right")), int(np.searchsorted(line, line[-1])))
    within = np.cumsum(weights[piece * PIECE : (piece + 1) * PIECE], dtype=np.float64)
    target -= line[piece] - sums[piece]
    place = min(int(np.searchsorted(within, target, side="right")), int(np.searchsorted(within, within[-1])))
    return piece * PIECE + place  # rounding: never behind the last weight above zero


def _top(logits: Floats, count: int) -> NDArray[np.int64]:
    """The largest, the largest first; of equal ones the smaller number first."""
    if count < len(logits):
        least = logits[np.argpartition(logits, len(logits) - count)[len(logits) - count]]
        found = np.flatnonzero(logits >= least)  # may be more than ``count`` where some are equal
    else:
        found = np.arange(len(logits))
    return found[np.lexsort((found, -logits[found]))][:count]


def _nucleus(weights: Floats, share: float) -> NDArray[np.int64]:
    """The fewest that together have this share of the weight, in order of their numbers; of equal ones the first."""
    falling = np.sort(weights)[::-1]  # values alone sort ten times as fast as their numbers do
    line = np.cumsum(falling, dtype=np.float64)
    count = min(int(np.searchsorted(line, share * line[-1], side="left")) + 1, len(weights))
    least = falling[count - 1]
    left = np.flatnonzero(weights >= least)
    surplus = len(left) - count
    if surplus:
        left = np.setdiff1d(left, np.flatnonzero(weights == least)[-surplus:], assume_unique=True)
    return left


def log_probabilities(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max()
    shifted -= np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    return shifted


def scored(logits: Floats, token: int, likeliest: int) -> Scored:
    logs = log_probabilities(logits)
    top = _top(logits, likeliest) if likeliest else ()
    return Scored(float(logs[token]), [(int(t), float(logs[t])) for t in top])
