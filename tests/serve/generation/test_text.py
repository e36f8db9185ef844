"""Tokens to text as they come."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.generation.tiny_gpt import byte_tokenizer

from shoal.data.tokenizer import ByteTokenizer, CharTokenizer, from_description
from shoal.serve.generation.text import TextStream

BPE = from_description({"kind": "json", "json": byte_tokenizer()})


def told(tokenizer, tokens, stops=()):
    """(pieces, whether it stopped)"""
    stream = TextStream(tokenizer, stops)
    pieces = []
    for token in tokens:
        stream.feed(token)
        pieces.append(stream.take())
        if stream.stopped:
            break
    pieces.append(stream.take(last=True))
    return pieces, stream.stopped


@settings(max_examples=80)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_the_pieces_make_the_text_and_no_character_is_torn(tokenizer, text):
    tokens = tokenizer.encode(text)
    pieces, stopped = told(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == text
    assert not stopped
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) or "\N{REPLACEMENT CHARACTER}" in text


@settings(max_examples=200)
@given(text=st.text("ab\u00e9", max_size=30), stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string_and_nothing_of_it_was_given_out(text, stops):
    pieces, stopped = told(ByteTokenizer(), text.encode(), stops)
    places = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(places)
    given_out = "".join(pieces)
    assert text.startswith(given_out)
    if not places:
        assert given_out == text
    else:  # of stop strings that overlap the one that is complete first counts
        ends = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        complete = [text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == ends]
        assert len(given_out) == min(complete)


def test_a_word_that_may_become_a_stop_string_waits_and_comes_when_it_does_not():
    stream = TextStream(CharTokenizer("".join(sorted(set("enough said")))), ["end"])
    seen = []
    for character in "sen":
        stream.feed(stream._tokenizer.encode(character)[0])
        seen.append(stream.take())
    assert seen == ["s", "", ""]
    stream.feed(stream._tokenizer.encode("o")[0])
    assert stream.take() == "eno"


def test_bytes_that_never_become_a_character_do_not_hold_the_text_up_for_ever():
    pieces, _ = told(ByteTokenizer(), [0xE2] * 30 + list(b"ok"))
    assert "".join(pieces).endswith("ok")
    assert any(pieces[:20])


def test_a_tokenizer_that_writes_a_space_before_words_keeps_it():
    backend = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": {"one": 0, "two": 1, "##s": 2, "?": 3}, "unk_token": "?"},
            "pre_tokenizer": {"type": "Whitespace"},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        }
    )
    tokenizer = from_description({"kind": "json", "json": backend})
    pieces, _ = told(tokenizer, [0, 1, 2, 0])
    assert pieces[:4] == ["one", " two", "s", " one"]
