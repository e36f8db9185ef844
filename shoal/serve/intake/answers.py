"""Questions about a text: windows over a long context, and the best span of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.models.squad import Window, best_span
from shoal.serve.http.messages import HttpError
from shoal.serve.intake.task import several
from shoal.serve.intake.texts import Texts
from shoal.serve.payloads import Inputs, Outputs, array

MOST_QUESTION = 64  # tokens; longer questions are cut, as in shoal.data.squad
STRIDE = 128  # tokens from one window to the next, likewise
MOST_WINDOWS = 64  # of one question
LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class Asked:
    question: str
    context: str
    windows: tuple[tuple[tuple[int, int] | None, ...], ...]  # for each token the characters of the context
    tokens: tuple[tuple[list[int], list[int]], ...]  # of each window: ids, types


class Answers:
    _TEXT: Mapping[str, Any] = {"type": "string", "pattern": r"\S"}
    _ONE: Mapping[str, Any] = {
        "type": "object",
        "properties": {"question": _TEXT, "context": _TEXT},
        "required": ["question", "context"],
    }
    fields: Mapping[str, Any] = {
        **_ONE["properties"],
        "inputs": {"oneOf": [_ONE, {"type": "array", "items": _ONE, "minItems": 1}]},
    }
    alternatives: tuple[tuple[str, ...], ...] = (("question", "context"), ("inputs",))
    example: Mapping[str, Any] = {"question": "Who answers?", "context": "The model answers the question."}

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._texts = Texts(facts)

    def read(self, body: Mapping[str, Any]) -> list[Any]:
        if {"inputs", "question", "context"} <= body.keys():
            raise HttpError(400, "the body must have 'question' and 'context', or 'inputs'", param="inputs")
        asked = several(body["inputs"], dict, "inputs") if "inputs" in body else [body]
        for one in asked:
            for name in ("question", "context"):
                if not isinstance(one.get(name), str) or not one[name].strip():
                    raise HttpError(400, f"{name!r} must be a text", param=name)
        return [self._windows(one["question"].strip(), one["context"]) for one in asked]

    def _windows(self, question: str, context: str) -> Asked:
        """As shoal.data.squad lays them: [start] question [separator] a window of the context [separator]."""
        texts = self._texts
        (asked, _), (ids, spans) = texts.tokenizer.spans([question, context])
        asked = asked[: min(MOST_QUESTION, texts.context - 4)]
        room = texts.context - 3 - len(asked)
        step = min(STRIDE, room)
        count = max(0, -(-(len(ids) - room) // step)) + 1
        if count > MOST_WINDOWS:
            raise HttpError(413, f"the context has {len(ids)} tokens: send less at once", param="context")
        windows, tokens = [], []
        for first in range(0, count * step, step):
            piece = ids[first : first + room]
            head = [texts.start, *asked, texts.separator]
            tokens.append(([*head, *piece, texts.separator], [0] * len(head) + [1] * (len(piece) + 1)))
            windows.append((*(None for _ in head), *spans[first : first + room], None))
        return Asked(question, context, tuple(windows), tuple(tokens))

    def inputs(self, sample: Any) -> list[Inputs]:
        made = []
        for ids, types in sample.tokens:
            arrays = {"tokens": array(np.array([ids], np.int32)), "types": array(np.array([types], np.int32))}
            made.append(Inputs(1, len(ids), arrays))
        return made

    def prediction(self, sample: Any, outputs: Sequence[Outputs]) -> Any:
        """The likeliest span; "" where "no answer" is likelier (Devlin et al., 2019, section 4.3)."""
        null, found = np.inf, (-np.inf, 0, 0)
        for offsets, output in zip(sample.windows, outputs, strict=True):
            logits = output.arrays["spans"].numpy()[0]
            null = min(null, float(logits[0, 0] + logits[0, 1]))
            best = best_span(Window("", offsets, logits[:, 0], logits[:, 1]), LONGEST_ANSWER)
            if best is not None and best[0] > found[0]:
                found = best[0], offsets[best[1]][0], offsets[best[2]][1]
        score, start, end = found
        if null > score:
            return {"answer": "", "score": null, "start": 0, "end": 0}
        return {"answer": sample.context[start:end], "score": float(score), "start": int(start), "end": int(end)}
