"""Extractive question answering from files in the SQuAD 2.0 JSON format (Rajpurkar et al., 2018)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.config import SourceConfig, at_least, read_config
from shoal.data.ledger import Ids
from shoal.data.source import Batch, Splits
from shoal.data.special import SpecialTokens, special_tokens
from shoal.data.split import random_parts
from shoal.data.tokenizer import Tokenizer, open_tokenizer
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec


@dataclass(frozen=True, kw_only=True)
class SquadConfig(SourceConfig):
    tokenizer: str = "bytes"  # "bytes", or the path of a tokenizer.json
    context: int = 384  # tokens of a sample: start, question, separator, a window of the context, separator
    stride: int = 128  # tokens from one window of a long context to the next
    question: int = 64  # longer questions are cut to so many tokens

    def __post_init__(self) -> None:
        at_least(1, stride=self.stride, question=self.question)
        at_least(self.question + 4, context=self.context)


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    context: int  # index of its context
    answers: tuple[Mapping[str, Any], ...]  # {"text", "answer_start"}; () when it cannot be answered


@dataclass(frozen=True)
class Passage:
    """A text's tokens, and the characters that each was made of."""

    ids: NDArray[np.int32]  # [tokens]
    spans: NDArray[np.int32]  # [tokens, 2]: first, one past the last


@dataclass(frozen=True)
class SquadSource:
    """One sample a window: {"tokens": int64, "mask": bool, "types": int64 [n, context], "start", "end": int64 [n]}.

    ``types`` is 1 from the window's first token on; ``start`` and ``end`` are the answer's first and last token, or 0
    (the start token) for a window that does not hold it. The first of several answers is the one to learn."""

    config: SquadConfig
    tokenizer: Tokenizer
    contexts: tuple[str, ...]
    questions: tuple[Question, ...]
    passages: tuple[Passage, ...]  # of the contexts
    asked: tuple[NDArray[np.int32], ...]  # tokens of the questions
    windows: NDArray[np.int64]  # [samples, 2]: index of the question, first token of its context

    def __len__(self) -> int:
        return len(self.windows)

    @cached_property
    def special(self) -> SpecialTokens:
        return special_tokens(self.tokenizer)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.special.facts(self.tokenizer, self.config.context)

    @cached_property
    def fingerprint(self) -> str:
        plain = [
            self.dataset,
            self.tokenizer.description(),
            self.config.context,
            self.config.stride,
            self.config.question,
        ]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """The questions and contexts of this source alone, in the SQuAD 2.0 JSON format."""
        asked: list[list[dict[str, Any]]] = [[] for _ in self.contexts]
        for one in self.questions:
            answers = [dict(answer) for answer in one.answers]
            entry = {"id": one.id, "question": one.text, "answers": answers, "is_impossible": not answers}
            asked[one.context].append(entry)
        paragraphs = [{"context": text, "qas": qas} for text, qas in zip(self.contexts, asked, strict=True) if qas]
        return {"version": "v2.0", "data": [{"title": "", "paragraphs": paragraphs}]}

    def example(self, id: int) -> dict[str, Any]:
        """The texts behind a sample: "id" of the question, "question", "context", "answers", and "offsets": for each of
        the sample's tokens the (first, one past the last) character of the context, None where it is not of it."""
        question, first = self._at(id)
        start, end = self._place(id)
        spans = self.passages[question.context].spans[first : first + end - start].tolist()
        offsets = [None] * start + [(a, b) for a, b in spans] + [None] * (self.config.context - end)
        return {
            "id": question.id,
            "question": question.text,
            "context": self.contexts[question.context],
            "answers": [dict(answer) for answer in question.answers],
            "offsets": offsets,
        }

    def fetch(self, ids: Ids, epoch: int) -> Batch:
        shape = (len(ids), self.config.context)
        tokens = np.full(shape, self.special.pad, np.int64)
        mask, types = np.zeros(shape, np.bool_), np.zeros(shape, np.int64)
        answers = np.zeros((2, len(ids)), np.int64)
        for row, id in enumerate(ids.tolist()):
            start, end = self._place(id)
            index, first = self.windows[id].tolist()
            passage = self.passages[self.questions[index].context]
            tokens[row, 0] = self.special.start
            tokens[row, 1 : start - 1] = self.asked[index]
            tokens[row, start - 1] = tokens[row, end] = self.special.separator
            tokens[row, start:end] = passage.ids[first : first + end - start]
            mask[row, : end + 1] = True
            types[row, start : end + 1] = 1
            answers[:, row] = self._answer(id)
        arrays = {"tokens": tokens, "mask": mask, "types": types, "start": answers[0], "end": answers[1]}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _at(self, id: int) -> tuple[Question, int]:
        index, first = self.windows[id].tolist()
        return self.questions[index], first

    def _place(self, id: int) -> tuple[int, int]:
        """Where the window of context stands in the sample: its first token, and the separator after its last."""
        index, first = self.windows[id].tolist()
        start = len(self.asked[index]) + 2
        left = len(self.passages[self.questions[index].context].ids) - first
        return start, min(start + left, self.config.context - 1)

    def _answer(self, id: int) -> tuple[int, int]:
        question, first = self._at(id)
        if not question.answers:
            return 0, 0
        start, end = self._place(id)
        spans = self.passages[question.context].spans
        begin = question.answers[0]["answer_start"]
        stop = begin + len(question.answers[0]["text"])
        from_token = int(np.searchsorted(spans[:, 1], begin, side="right")) - first + start
        to_token = int(np.searchsorted(spans[:, 0], stop - 1, side="right")) - 1 - first + start
        return (from_token, to_token) if start <= from_token <= to_token < end else (0, 0)


def open_squad(spec: DataSpec, seed: int) -> Splits:
    """The windows of a file's questions, some contexts with all of their questions held out at random; those of the
    file at ``test_path`` to test on.

    Raises UserError when a file is missing or not in the format."""
    config = read_config(SquadConfig, spec)
    tokenizer = open_tokenizer(config.tokenizer)
    contexts, questions = read_squad(spec.path)
    parts = random_parts(len(contexts), spec.validation, spec.test, seed)

    def part(kept: Ids) -> SquadSource | None:
        if not len(kept):
            return None
        number = {old: new for new, old in enumerate(kept.tolist())}
        mine = [replace(one, context=number[one.context]) for one in questions if one.context in number]
        if not mine:
            raise UserError(f"data: the contexts of {spec.path!r} held out have no question: change the shares.")
        return squad_source(config, tokenizer, [contexts[i] for i in kept], mine)

    train, test = part(parts.train), part(parts.test)
    if spec.test_path:
        test = squad_source(config, tokenizer, *read_squad(spec.test_path))
    if train is None:
        raise UserError(f"data: nothing of {spec.path!r} is left to train on: lower the shares held out.")
    return Splits(train, part(parts.validation), test)


def read_squad(path: str) -> tuple[list[str], list[Question]]:
    """The contexts of a file, and its questions. Raises UserError naming what is not in the format."""
    try:
        plain = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"data: no file {path!r}: check data.path.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path!r} is not a JSON file: {error}.") from None
    contexts: list[str] = []
    questions: list[Question] = []
    try:
        for paragraph in (paragraph for article in plain["data"] for paragraph in article["paragraphs"]):
            contexts.append(paragraph["context"])
            for entry in paragraph["qas"]:
                given = [{"text": a["text"], "answer_start": a["answer_start"]} for a in entry["answers"]]
                answers = () if entry.get("is_impossible") else tuple(given)
                _check_answers(answers, contexts[-1], entry["id"], path)
                questions.append(Question(entry["id"], entry["question"].strip(), len(contexts) - 1, answers))
    except (KeyError, TypeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise UserError(f"{path!r} is not in the SQuAD format, at context {len(contexts)}: {text}.") from None
    if not questions:
        raise UserError(f"{path!r} holds no questions.")
    return contexts, questions


def _check_answers(answers: Sequence[Mapping[str, Any]], context: str, id: str, path: str) -> None:
    for answer in answers:
        start = answer["answer_start"]
        if not answer["text"] or not 0 <= start <= len(context) - len(answer["text"]):
            raise UserError(f"{path!r}: the answer to question {id!r} does not lie in its context: mend or remove it.")


def squad_source(
    config: SquadConfig, tokenizer: Tokenizer, contexts: Sequence[str], questions: Sequence[Question]
) -> SquadSource:
    """Tokenises everything and lays the windows: each starts ``stride`` tokens after the one before, until one reaches
    the context's end."""
    passages = tuple(
        Passage(np.array(ids, np.int32), np.array(spans, np.int32).reshape(-1, 2))
        for ids, spans in tokenizer.spans(contexts)
    )
    encoded = tokenizer.spans([question.text for question in questions])
    asked = tuple(np.array(ids[: config.question], np.int32) for ids, _ in encoded)
    windows = []
    for index, question in enumerate(questions):
        room = config.context - 3 - len(asked[index])
        rest = len(passages[question.context].ids) - room
        step = min(config.stride, room)
        windows += [(index, first * step) for first in range(max(0, -(-rest // step)) + 1)]
    return SquadSource(
        config, tokenizer, tuple(contexts), tuple(questions), passages, asked, np.array(windows, np.int64)
    )
