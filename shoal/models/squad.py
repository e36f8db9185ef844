"""Answers in the SQuAD 2.0 JSON format (Rajpurkar et al., 2018): from span logits to texts, from texts to scores."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Window:
    """One stretch of a context as the model saw it, with what it gave."""

    question: str  # the question's id
    offsets: Sequence[tuple[int, int] | None]  # characters of the context that each token covers; None: not of it
    start: np.ndarray  # float [T]: logits of the answer's first token; token 0 stands for "no answer"
    end: np.ndarray  # float [T]: logits of its last token


def best_span(window: Window, longest: int) -> tuple[float, int, int] | None:
    """(score, first token, last token) of the likeliest span inside the context of at most ``longest`` tokens.

    The score is the sum of both logits; of equal spans the earliest wins. None when the window holds no context."""
    inside = np.array([place is not None for place in window.offsets])
    size = len(inside)
    if not inside.any():
        return None
    scores = np.where(inside, window.start[:size], -np.inf)[:, None] + np.where(inside, window.end[:size], -np.inf)
    ahead = np.arange(size)[None, :] - np.arange(size)[:, None]
    scores[(ahead < 0) | (ahead >= longest)] = -np.inf
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[first, last]), int(first), int(last)


def decode_answers(
    windows: Iterable[Window],
    contexts: Mapping[str, str],
    *,
    longest: int = 30,
    unanswerable: bool = True,
    null_threshold: float = 0.0,
) -> dict[str, str]:
    """Question id -> text of the best span over all its windows; ``contexts`` maps question ids to their contexts.

    With ``unanswerable``, the answer is "" where the least "no answer" score of its windows (logits of token 0)
    exceeds the best span's by more than ``null_threshold`` (Devlin et al., 2019, section 4.3)."""
    spans: dict[str, tuple[float, str]] = {}
    null: dict[str, float] = {}
    for window in windows:
        question = window.question
        null[question] = min(null.get(question, np.inf), float(window.start[0] + window.end[0]))
        spans.setdefault(question, (-np.inf, ""))
        best = best_span(window, longest)
        if best is None or best[0] <= spans[question][0]:
            continue
        score, first, last = best
        begin, end = window.offsets[first], window.offsets[last]
        if begin is not None and end is not None:
            spans[question] = (score, contexts[question][begin[0] : end[1]])
    return {
        question: "" if unanswerable and null[question] - score > null_threshold else text
        for question, (score, text) in spans.items()
    }


def normalise(answer: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    return float(normalise(answer) == normalise(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words; where either has no words, 1 if both have none, else 0."""
    given, wanted = normalise(answer).split(), normalise(gold).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def squad_scores(predictions: Mapping[str, str], dataset: Mapping[str, Any]) -> dict[str, float]:
    """Scores in per cent of predictions {question id: text} on a data set in the SQuAD JSON format.

    "exact" and "f1" over all questions, "total" their number; with the prefix HasAns_ or NoAns_ over those with and
    without an answer, where there are any. Each question counts its best gold answer; without gold answers it wants "".
    Raises UserError when the data set is not in the format or a question has no prediction."""
    answers = _gold_answers(dataset)
    gold = {question: [text for text in texts if normalise(text)] for question, texts in answers.items()}
    missing = [question for question in gold if question not in predictions]
    if missing:
        raise UserError(f"{len(missing)} of {len(gold)} questions have no prediction; the first is {missing[0]!r}.")
    exact = {q: max(exact_match(predictions[q], text) for text in texts or [""]) for q, texts in gold.items()}
    overlap = {q: max(f1(predictions[q], text) for text in texts or [""]) for q, texts in gold.items()}
    scores: dict[str, float] = {}
    groups = {"": list(gold), "HasAns_": [q for q in gold if answers[q]], "NoAns_": [q for q in gold if not answers[q]]}
    for prefix, questions in groups.items():
        if questions:
            scores[f"{prefix}exact"] = 100 * sum(exact[q] for q in questions) / len(questions)
            scores[f"{prefix}f1"] = 100 * sum(overlap[q] for q in questions) / len(questions)
            scores[f"{prefix}total"] = len(questions)
    return scores


def _gold_answers(dataset: Mapping[str, Any]) -> dict[str, list[str]]:
    try:
        questions = [qa for article in dataset["data"] for part in article["paragraphs"] for qa in part["qas"]]
        gold = {qa["id"]: [answer["text"] for answer in qa["answers"]] for qa in questions}
    except (KeyError, TypeError) as error:
        raise UserError(f"the data set is not in the SQuAD JSON format: {type(error).__name__}: {error}.") from None
    if not gold:
        raise UserError("the data set in the SQuAD JSON format holds no question.")
    return gold
