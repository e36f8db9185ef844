"""Answers in the shapes of OpenAI's API: whole, and piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.data.tokenizer import Tokenizer
from shoal.serve.generation.messages import Outcome, Piece, Scored
from shoal.serve.generation.text import UNFINISHED, TextStream


@dataclass(frozen=True)
class Mark:
    """A token with its log-probability, and where in the answer its text begins."""

    token: str
    raw: bytes
    logprob: float
    likeliest: Sequence[tuple[str, bytes, float]]
    offset: int


@dataclass(frozen=True)
class Delta:
    """What is new in one choice."""

    index: int
    text: str
    marks: Sequence[Mark]
    reason: str  # "" while it goes on


class Choice:
    """One answer on its way to the client."""

    def __init__(self, index: int, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.index = index
        self.ended = False
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, stops)

    def feed(self, piece: Piece, ends: Sequence[int]) -> Delta:
        marks = []
        for place, token in enumerate(piece.tokens):
            is_end = token in ends
            start = len(self._stream.text) if is_end else self._stream.feed(token)
            if piece.scores and not (self._stream.stopped and start >= len(self._stream.text)):
                marks.append(self._mark(token, piece.scores[place], start))
            if self._stream.stopped:
                break
        self.ended = bool(self._stream.stopped or piece.reason)
        text = self._stream.take(last=self.ended)  # what was held back may hold a stop string
        return Delta(self.index, text, marks, "stop" if self._stream.stopped else piece.reason)

    def _mark(self, token: int, scored: Scored, offset: int) -> Mark:
        likeliest = [(*self._shown(other), logprob) for other, logprob in scored.likeliest]
        return Mark(*self._shown(token), scored.logprob, likeliest, offset)

    def _shown(self, token: int) -> tuple[str, bytes]:
        text = self._tokenizer.decode([token])
        return text, self._tokenizer.raw(token) if UNFINISHED in text else text.encode("utf-8", "replace")


@dataclass
class Usage:
    prompt: int = 0
    reused: int = 0
    generated: int = 0

    def add(self, outcome: Outcome) -> None:
        self.reused += outcome.reused

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }


@dataclass
class _Whole:
    text: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    reason: str = "length"


class Form:
    """The shape of the answers of one endpoint."""

    def __init__(self, chat: bool, logprobs: bool, facts: dict[str, Any]) -> None:
        self._chat = chat
        self._logprobs = logprobs
        kind = "chat.completion" if chat else "text_completion"
        self._facts = {**facts, "object": kind}
        self._chunk_facts = {**facts, "object": "chat.completion.chunk" if chat else kind}
        self._started: set[int] = set()

    def chunk(self, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": delta.index, "logprobs": self._scores(delta.marks)}
        if self._chat:
            content: dict[str, Any] = {}
            if delta.index not in self._started:
                self._started.add(delta.index)
                content["role"] = "assistant"
            if delta.text or content:
                content["content"] = delta.text
            choice["delta"] = content
        else:
            choice["text"] = delta.text
        choice["finish_reason"] = delta.reason or None
        return {**self._chunk_facts, "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk_facts, "choices": [], "usage": usage.json()}

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        wholes: dict[int, _Whole] = {}
        for delta in deltas:
            whole = wholes.setdefault(delta.index, _Whole())
            whole.text.append(delta.text)
            whole.marks += delta.marks
            whole.reason = delta.reason or whole.reason
        choices = []
        for index, whole in sorted(wholes.items()):
            text = "".join(whole.text)
            said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            facts = {"index": index, "logprobs": self._scores(whole.marks), "finish_reason": whole.reason}
            choices.append({**said, **facts})
        return {**self._facts, "choices": choices, "usage": usage.json()}

    def _scores(self, marks: Sequence[Mark]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self._chat:
            return {"content": [_chat_mark(mark) for mark in marks]}
        return {
            "tokens": [_named(mark.token, mark.raw) for mark in marks],
            "token_logprobs": [mark.logprob for mark in marks],
            "top_logprobs": [{_named(text, raw): logprob for text, raw, logprob in mark.likeliest} for mark in marks],
            "text_offset": [mark.offset for mark in marks],
        }


def _named(text: str, raw: bytes) -> str:
    """Of a token that is a part of a character only, its bytes, as OpenAI writes them: names must differ."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if UNFINISHED in text else text


def _chat_mark(mark: Mark) -> dict[str, Any]:
    likeliest = [{"token": text, "bytes": list(raw), "logprob": logprob} for text, raw, logprob in mark.likeliest]
    return {"token": mark.token, "bytes": list(mark.raw), "logprob": mark.logprob, "top_logprobs": likeliest}
