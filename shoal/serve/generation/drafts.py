"""Guesses of the next tokens, for a model to check several at once (Leviathan et al., 2023). A wrong one costs time."""

from collections.abc import Container, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from shoal.serve.generation.blocks import BlockPool
from shoal.serve.generation.step import BLOCK, Floats, Rows, Step

WINDOW = 1024  # tokens that are searched for repetitions, from the end
CATCH_UP = 256  # rows that a small model computes of tokens that it does not know yet, in one turn


class Wish(NamedTuple):
    name: tuple[int, int]  # of the stream
    tokens: Sequence[int]  # so far
    most: int  # guesses; at least 1


class Drafts(Protocol):
    def guess(self, wishes: Sequence[Wish], alive: Container[tuple[int, int]]) -> list[list[int]]:
        """For each wish some tokens, or none. Streams that are not ``alive`` will not be asked for again."""


class Repetition:
    """What followed the last time that a text's last three or two tokens stood there (Saxena, 2023)."""

    def guess(self, wishes: Sequence[Wish], alive: Container[tuple[int, int]]) -> list[list[int]]:
        return [repeated(wish.tokens, wish.most) for wish in wishes]


def repeated(tokens: Sequence[int], count: int) -> list[int]:
    text = list(tokens[-WINDOW:])
    for length in (3, 2):
        tail = text[-length:]
        for at in range(len(text) - length - 1, -1, -1):
            if text[at] == tail[0] and text[at : at + length] == tail:
                return text[at + length : at + length + count]
    return []


class SmallModel:
    """What a small model of the same vocabulary finds likeliest. It keeps a cache of its own."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._pool = BlockPool(step.blocks)
        self._blocks: dict[tuple[int, int], list[int]] = {}
        self._known: dict[tuple[int, int], list[int]] = {}  # tokens that lie in them

    def guess(self, wishes: Sequence[Wish], alive: Container[tuple[int, int]]) -> list[list[int]]:
        for name in [name for name in self._blocks if name not in alive]:
            self._drop(name)
        guesses: list[list[int]] = [[] for _ in wishes]
        texts = [list(wish.tokens) for wish in wishes]
        at_work = [place for place, wish in enumerate(wishes) if self._room(wish)]
        rows_left = CATCH_UP
        while at_work:
            parts: list[tuple[int, int, int]] = []  # (place among the wishes, from, to)
            for place in at_work:
                known = self._matching(wishes[place].name, texts[place])
                end = min(len(texts[place]), known + max(rows_left, 1))
                rows_left -= end - known
                parts.append((place, known, end))
            logits = self._run([(wishes[place].name, texts[place], start, end) for place, start, end in parts])
            at_work = []
            for (place, _, end), row in zip(parts, logits, strict=True):
                if end < len(texts[place]):
                    continue  # it knows more of this text the next time
                token = int(row.argmax())
                guesses[place].append(token)
                texts[place].append(token)
                if len(guesses[place]) < wishes[place].most:
                    at_work.append(place)
        return guesses

    def _room(self, wish: Wish) -> bool:
        """Blocks for the text and its guesses; False where there are none, or where it is too long for the model."""
        length = len(wish.tokens) + wish.most
        blocks = self._blocks.setdefault(wish.name, [])
        self._known.setdefault(wish.name, [])
        need = -(-length // BLOCK) - len(blocks)
        if length > self.step.context or need > self._pool.available:
            self._drop(wish.name)
            return False
        blocks += [self._pool.take() for _ in range(need)]
        return True

    def _drop(self, name: tuple[int, int]) -> None:
        for block in self._blocks.pop(name):
            self._pool.release(block)
        del self._known[name]

    def _matching(self, name: tuple[int, int], text: list[int]) -> int:
        """How many of the text's tokens it has, without guesses that turned out wrong; never the last one."""
        known = self._known[name]
        most = min(len(known), len(text) - 1)
        same = most if known[:most] == text[:most] else next(i for i in range(most) if known[i] != text[i])
        del known[same:]
        return same

    def _run(self, parts: Sequence[tuple[tuple[int, int], list[int], int, int]]) -> Floats:
        """The logits of the last row of each part of a text."""
        tokens = [token for _, text, start, end in parts for token in text[start:end]]
        places = [place for _, _, start, end in parts for place in range(start, end)]
        owners = [number for number, (_, _, start, end) in enumerate(parts) for _ in range(start, end)]
        lasts = np.cumsum([end - start for _, _, start, end in parts]) - 1
        tables = np.zeros((len(parts), max(len(self._blocks[name]) for name, *_ in parts)), np.int32)
        for number, (name, text, start, end) in enumerate(parts):
            tables[number, : len(self._blocks[name])] = self._blocks[name]
            self._known[name] += text[start:end]
        columns = [np.array(column, np.int64) for column in (tokens, places, owners, lasts)]
        return self.step.run(Rows(columns[0], columns[1], columns[2], tables, columns[3]))
