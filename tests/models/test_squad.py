"""Answers as texts: decoding spans and scoring."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.registry import open_data
from shoal.errors import UserError
from shoal.models.squad import Window, best_span, decode_answers, exact_match, f1, normalise, squad_scores
from shoal.recipe.recipe import DataSpec

TEXT = "The shoal of many small fish moves as one."
WORDS = [(0, 3), (4, 9), (10, 12), (13, 17), (18, 23), (24, 28), (29, 34), (35, 37), (38, 41), (41, 42)]


def _dataset(**answers: list[str]) -> dict[str, object]:
    qas = [{"id": q, "question": "?", "answers": [{"text": t} for t in texts]} for q, texts in answers.items()]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": TEXT, "qas": qas}]}]}


def _window(question: str, start: dict[int, float], end: dict[int, float]) -> Window:
    """Two tokens of no context, then the words; logits of -9 but where they are given."""
    size = len(WORDS) + 2
    logits = [np.array([given.get(i, -9.0) for i in range(size)], np.float32) for given in (start, end)]
    return Window(question, [None, None, *WORDS], *logits)


def test_answers_are_compared_without_case_articles_punctuation_and_spaces():
    assert normalise("  The  small, SMALL fish! ") == "small small fish"
    assert normalise("a theatre; an area") == "theatre area"
    assert exact_match("The Fish.", "fish") == 1.0
    assert exact_match("fishes", "fish") == 0.0


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("small fish", "small fish", 1.0),
        ("many small fish", "small fish", 0.8),  # precision 2/3, recall 1
        ("fish fish", "fish", 2 / 3),  # a word counts as often as it stands in both
        ("whale", "fish", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("fish", "", 0.0),
        ("", "fish", 0.0),
    ],
)
def test_f1_is_the_overlap_of_words(answer, gold, score):
    assert f1(answer, gold) == pytest.approx(score)


words = st.text(alphabet="ab cd.,", max_size=12)


@given(words, words)
def test_f1_is_symmetric_at_most_one_and_one_for_an_exact_match(answer, gold):
    assert 0 <= f1(answer, gold) <= 1
    assert f1(answer, gold) == pytest.approx(f1(gold, answer))
    if exact_match(answer, gold):
        assert f1(answer, gold) == 1.0


def test_scores_take_the_best_gold_answer_and_tell_answerable_questions_from_others():
    dataset = _dataset(a=["one fish", "many small fish"], b=["shoal"], c=[], d=[])
    scores = squad_scores({"a": "small fish", "b": "whale", "c": "", "d": "fish"}, dataset)
    assert scores == pytest.approx(
        {
            "exact": 25.0,
            "f1": 45.0,
            "total": 4,
            "HasAns_exact": 0.0,
            "HasAns_f1": 40.0,
            "HasAns_total": 2,
            "NoAns_exact": 50.0,
            "NoAns_f1": 50.0,
            "NoAns_total": 2,
        }
    )


def test_a_data_set_without_unanswerable_questions_has_no_scores_of_them():
    assert set(squad_scores({"a": "x"}, _dataset(a=["x"]))) == {
        *("exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total")
    }


@pytest.mark.parametrize(
    ("predictions", "dataset", "said"),
    [
        ({"a": "x"}, _dataset(a=["x"], b=["y"]), "1 of 2 questions have no prediction; the first is 'b'"),
        ({}, {"data": [{"text": 3}]}, "not in the SQuAD JSON format: KeyError: 'paragraphs'"),
        ({}, {"data": []}, "holds no question"),
    ],
)
def test_scores_of_incomplete_input_are_refused(predictions, dataset, said):
    with pytest.raises(UserError, match=said):
        squad_scores(predictions, dataset)


def test_the_answer_is_the_text_of_the_likeliest_span():
    window = _window("q", {5: 4.0}, {7: 4.0})
    assert decode_answers([window], {"q": TEXT}) == {"q": "many small fish"}


def test_an_answer_ends_after_its_start_inside_the_context_and_within_the_longest_length():
    backwards = _window("q", {7: 9.0, 5: 3.0}, {5: 9.0, 6: 3.0})
    assert best_span(backwards, longest=30) == (12.0, 5, 5)
    outside = _window("q", {1: 50.0, 4: 1.0}, {1: 50.0, 4: 1.0})
    assert best_span(outside, longest=30) == (2.0, 4, 4)
    wide = _window("q", {2: 5.0, 8: 1.0}, {8: 5.0})
    assert best_span(wide, longest=30) == (10.0, 2, 8)
    assert best_span(wide, longest=6) == (6.0, 8, 8)
    assert best_span(Window("q", [None], np.zeros(1), np.zeros(1)), longest=6) is None


def test_the_best_of_all_windows_of_a_question_wins():
    windows = [_window("q", {5: 2.0}, {6: 2.0}), _window("q", {3: 3.0}, {3: 3.0}), _window("p", {2: 1.0}, {2: 1.0})]
    assert decode_answers(windows, {"q": TEXT, "p": TEXT}) == {"q": "shoal", "p": "The"}


def test_a_question_has_no_answer_when_every_window_rather_says_so():
    sure = _window("q", {0: 9.0, 5: 2.0}, {0: 9.0, 5: 2.0})
    assert decode_answers([sure], {"q": TEXT}) == {"q": ""}
    assert decode_answers([sure], {"q": TEXT}, null_threshold=14.0) == {"q": "many"}
    assert decode_answers([sure], {"q": TEXT}, unanswerable=False) == {"q": "many"}
    unsure = _window("q", {}, {})
    assert decode_answers([sure, unsure], {"q": TEXT}) == {"q": "many"}  # the least of the windows' scores counts


def test_a_model_that_knows_every_window_scores_all_points_on_the_source(tmp_path):
    passage = " ".join(f"word{i} stands here." for i in range(12))
    qas = [
        {"id": f"q{i}", "question": f"Which is {i}?", "answers": [{"text": f"word{i}", "answer_start": 0}]}
        for i in (0, 7, 11)
    ]
    for qa in qas:
        qa["answers"][0]["answer_start"] = passage.index(qa["answers"][0]["text"])
    qas.append({"id": "none", "question": "Which is missing?", "answers": [], "is_impossible": True})
    plain = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": passage, "qas": qas}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(plain), encoding="utf-8")
    options = {"context": 96, "stride": 40, "question": 20}
    spec = DataSpec(source="squad", path=str(tmp_path / "squad.json"), validation=0.0, options=options)
    source = open_data(spec, 0).train
    assert len(source) > len(qas)  # windows
    batch = source.fetch(np.arange(len(source)), 0)
    windows = []
    for id in range(len(source)):
        example = source.example(id)
        start, end = (np.where(np.arange(96) == int(batch[name][id]), 9.0, -9.0) for name in ("start", "end"))
        windows.append(Window(example["id"], example["offsets"], start, end))
    contexts = {qa["id"]: passage for qa in qas}
    scores = squad_scores(decode_answers(windows, contexts), source.dataset)
    assert (scores["exact"], scores["f1"], scores["NoAns_exact"]) == (100.0, 100.0, 100.0)
