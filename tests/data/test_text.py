"""Text sources: windows, tokenisers, and a cache that is never trusted unchecked."""

import errno
import json
import os
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
from forked_programs import Program
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.data.corpus import open_corpus
from shoal.data.registry import open_data
from shoal.data.split import shares, tail_ranges
from shoal.data.tokenizer import ByteTokenizer, CharTokenizer, corpus_tokenizer, from_description
from shoal.data.tokens import tokenise
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec

POEM = "".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(200))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def poem(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text(POEM)
    return path


def spec(path: Path | str, **options: object) -> DataSpec:
    parts = {name: options.pop(name) for name in ("validation", "test", "test_path") if name in options}
    return DataSpec(path=str(path), options=options, **parts)


def test_windows_follow_each_other_and_predict_each_token_once(poem):
    source = open_data(spec(poem, context=16, validation=0.0), 0).train
    windows = source.fetch(np.arange(len(source)), 0)["tokens"]
    assert windows.dtype == torch.int64
    assert bytes(windows[:, :-1].flatten().tolist()) == POEM.encode()[: 16 * len(source)]
    assert torch.equal(windows[1:, 0], windows[:-1, -1])


def test_held_out_text_never_overlaps_training_text(poem):
    splits = open_data(spec(poem, context=16, validation=0.1, test=0.2), 0)
    spans = [source.span for source in (splits.train, splits.validation, splits.test)]
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    last = splits.train.fetch(np.array([len(splits.train) - 1]), 0)["tokens"]
    assert (len(splits.train) - 1) * 16 + last.shape[1] <= spans[0].stop


@given(st.integers(3, 10_000), st.floats(0, 0.4), st.floats(0, 0.4))
@example(4, 0.375, 0.375)  # both round up to 2
def test_tail_ranges_cover_the_stream_without_overlap(total, validation, test):
    ranges = tail_ranges(total, validation, test)
    assert [i for part in ranges for i in (part.start, part.stop)] == [
        0, ranges[0].stop, ranges[0].stop, ranges[1].stop, ranges[1].stop, total,
    ]  # fmt: skip
    assert (len(ranges[1]) > 0) == (validation > 0)


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match="2 samples are too few"):
        shares(2, 0.4, 0.4)


@given(st.text())
def test_bytes_decode_to_the_text_they_came_from(text):
    tokenizer = ByteTokenizer()
    ((ids, spans),) = tokenizer.spans([text])
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [text[start:end].encode() for start, end in dict.fromkeys(spans)] == [c.encode() for c in text]


@pytest.mark.parametrize("name", ["bytes", "chars", "bpe"])
def test_a_description_makes_an_equal_tokeniser(poem, name):
    tokenizer = corpus_tokenizer(name, 300, open_corpus(str(poem)))
    again = from_description(json.loads(json.dumps(tokenizer.description())))
    assert again.encode(POEM[:500]) == tokenizer.encode(POEM[:500])
    assert again.decode(again.encode(POEM)) == POEM
    assert max(again.encode(POEM)) < again.vocab == tokenizer.vocab
    ((ids, spans),) = again.spans(["the fox"])
    assert ids == again.encode("the fox")
    assert "".join("the fox"[start:end] for start, end in spans) == "the fox"


def test_training_bpe_twice_gives_the_same_vocabulary(poem, monkeypatch, tmp_path):
    first = corpus_tokenizer("bpe", 300, open_corpus(str(poem)))
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "another"))
    assert corpus_tokenizer("bpe", 300, open_corpus(str(poem))).description() == first.description()


def test_tiny_shakespeare_has_65_characters(shared_data):
    source = open_data(spec(shared_data / "tinyshakespeare.txt", tokenizer="chars"), 0).train
    assert source.facts["vocab"] == 65
    tokens = source.fetch(np.arange(3), 0)["tokens"]
    assert source.tokenizer.decode(tokens[0].tolist()).startswith("First Citizen:\nBefore we proceed")


def test_a_character_outside_the_vocabulary_is_named():
    with pytest.raises(UserError, match=r"character 'z' is not among the 3"):
        CharTokenizer("abc").encode("abz")


def test_the_standard_library_needs_no_path():
    corpus = open_corpus("@stdlib", max_bytes=200_000)
    assert sum(map(len, corpus.raw())) <= 200_000
    assert all(file.suffix == ".py" and "site-packages" not in file.parts for file in corpus.files)
    assert list(corpus.files) == sorted(corpus.files, key=lambda file: file.parts)


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path):
    folder = tmp_path / "folder"
    for name, text in {"b.txt": "B", "a/z.txt": "Z\n", ".git/x.txt": "no", "c.md": "no"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert b"".join(open_corpus(str(folder), "*.txt").raw()) == b"Z\nB\n"
    with pytest.raises(UserError, match=r"no file in folder .* matches pattern '\*\.py'"):
        open_corpus(str(folder), "*.py")


def test_the_same_text_elsewhere_has_the_same_fingerprint(poem, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(POEM)
    prints = [open_data(spec(path, context=16), 0).train.fingerprint for path in (poem, copy)]
    assert prints[0] == prints[1]
    splits = open_data(spec(poem, context=16), 0)
    assert splits.validation.fingerprint != splits.train.fingerprint
    assert open_data(spec(poem, context=17), 0).train.fingerprint != prints[0]


def cache_file(cache: Path) -> Path:
    (path,) = cache.glob("tokens-*.bin")
    return path


def test_a_second_opening_reads_the_cache_and_does_not_tokenise(poem, cache, monkeypatch):
    first = tokenise(open_corpus(str(poem)), ByteTokenizer())
    monkeypatch.setattr(ByteTokenizer, "encode_corpus", lambda *_: pytest.fail("tokenised again"))
    again = tokenise(open_corpus(str(poem)), ByteTokenizer())
    assert np.array_equal(first.ids, again.ids)
    assert isinstance(again.ids, np.memmap)
    assert not again.ids.flags.writeable
    assert [path.suffix for path in cache.iterdir() if "lock" not in path.name] == [".bin"]


@pytest.mark.parametrize("damage", ["cut short", "one byte changed", "empty"])
def test_a_damaged_cache_file_is_made_again(poem, cache, damage):
    tokenise(open_corpus(str(poem)), ByteTokenizer())
    path = cache_file(cache)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes({"cut short": path.read_bytes()[:-7], "one byte changed": raw, "empty": b""}[damage])
    again = tokenise(open_corpus(str(poem)), ByteTokenizer())
    assert bytes(again.ids) == POEM.encode()


def test_a_damaged_cached_vocabulary_is_made_again(poem, cache):
    tokenizer = corpus_tokenizer("bpe", 300, open_corpus(str(poem)))
    (path,) = cache.glob("*.tokenizer.json")
    path.write_text(path.read_text()[:-50])
    assert corpus_tokenizer("bpe", 300, open_corpus(str(poem))).description() == tokenizer.description()


def test_a_build_that_fails_leaves_nothing_behind(poem, cache, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "encode_corpus", lambda *_: iter([np.zeros(3), 1 / 0]))
    with pytest.raises(ZeroDivisionError):
        tokenise(open_corpus(str(poem)), ByteTokenizer())
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_full_disk_is_named_and_leaves_nothing_behind(poem, cache, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shoal.data.tokens._write", full)
    with pytest.raises(UserError, match=r"No space left on device: set SHOAL_CACHE to another"):
        tokenise(open_corpus(str(poem)), ByteTokenizer())
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_processes_that_open_at_once_share_one_cache_file(poem, cache, warm):
    program = (
        "import sys; from shoal.data.corpus import open_corpus; from shoal.data.tokens import tokenise; "
        "from shoal.data.tokenizer import corpus_tokenizer; corpus = open_corpus(sys.argv[1]); "
        "print(tokenise(corpus, corpus_tokenizer('bpe', 300, corpus)).sha256)"
    )
    command = [sys.executable, "-c", program, str(poem)]
    processes = [Program(command, source=warm, stdout=PIPE, text=True) for _ in range(3)]
    digests = {process.communicate(timeout=60)[0] for process in processes}
    assert len(digests) == 1
    assert cache_file(cache).is_file()
    assert all(process.returncode == 0 for process in processes)


def test_a_cache_folder_that_cannot_be_written_is_named(poem, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(poem / "not-a-folder"))
    with pytest.raises(UserError, match="set SHOAL_CACHE to a folder that can be written"):
        tokenise(open_corpus(str(poem)), ByteTokenizer())


def test_mistakes_are_named_in_one_line(poem, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.json").write_text("{}")
    for wrong, message in [
        (spec(tmp_path / "none.txt"), r"no file or folder .*none.txt"),
        (spec(poem, contxt=3), r"unknown key 'contxt' in .* did you mean 'context'"),
        (spec(poem, context=0), "context must be at least 1"),
        (spec(poem, context="x"), "must be a whole number"),
        (spec(tmp_path / "empty.txt"), "holds no text"),
        (spec(poem, context=5000), r"validation text has .* tokens, fewer than context \+ 1 = 5001"),
        (spec(poem, tokenizer="sentencepiece"), "no tokeniser 'sentencepiece': give bytes, chars, bpe or the path"),
        (spec(poem, tokenizer="char"), "no tokeniser 'char': did you mean 'chars'"),
        (spec(poem, tokenizer=str(tmp_path / "bad.json")), "is not a tokenizer.json"),
        (DataSpec(source="txt"), "unknown data source 'txt': did you mean 'text'"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_data(wrong, 0)
        assert "\n" not in str(caught.value)
