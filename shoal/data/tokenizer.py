"""Tokenisers: bytes, characters, and any tokenizer.json of the ``tokenizers`` library."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.data.cache import cached
from shoal.data.corpus import Corpus
from shoal.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

NAMES = ("bytes", "chars", "bpe")
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
# How byte-level vocabularies write bytes: those that can be shown as themselves, the others from U+0100 on (GPT-2).
_BYTES = {chr(byte): byte for byte in _SHOWN} | {
    chr(256 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(_SHOWN)))
}
Spans = list[tuple[int, int]]  # (first, one past the last) character of each token


class Tokenizer(Protocol):
    """Text to ids 0 .. vocab - 1 and back."""

    @property
    def vocab(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def raw(self, id: int) -> bytes:
        """What a token stands for, in UTF-8; it may be a part of a character."""

    def spans(self, texts: Sequence[str]) -> list[tuple[list[int], Spans]]:
        """Of each text the ids, and the characters that each was made of."""

    def encode_corpus(self, corpus: Corpus) -> Iterator[NDArray[Any]]: ...

    def description(self) -> dict[str, Any]:
        """Plain JSON values from which ``from_description`` makes an equal tokeniser."""

    def special(self, *names: str) -> int | None:
        """The id of the first of these special tokens that the vocabulary has."""


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as they are: no text is unknown to it."""

    vocab: int = field(default=256, init=False)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")  # padding and its kin lie above 255

    def raw(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b""

    def spans(self, texts: Sequence[str]) -> list[tuple[list[int], Spans]]:
        places = ([(i, i + 1) for i, c in enumerate(text) for _ in c.encode("utf-8")] for text in texts)
        return list(zip(map(self.encode, texts), places, strict=True))

    def encode_corpus(self, corpus: Corpus) -> Iterator[NDArray[Any]]:
        return (np.frombuffer(chunk, np.uint8) for chunk in corpus.raw())

    def description(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def special(self, *names: str) -> int | None:
        return None


@dataclass(frozen=True)
class CharTokenizer:
    """One id for each character that the training text uses, in code point order."""

    characters: str

    @property
    def vocab(self) -> int:
        return len(self.characters)

    @cached_property
    def _points(self) -> NDArray[np.uint32]:
        return np.frombuffer(self.characters.encode("utf-32-le"), "<u4")

    def _ids(self, text: str) -> NDArray[np.int64]:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = np.minimum(np.searchsorted(self._points, points), self.vocab - 1)
        unknown = self._points[ids] != points
        if unknown.any():
            character = chr(points[unknown.argmax()])
            raise UserError(
                f"character {character!r} is not among the {self.vocab} of the training text: leave it out."
            )
        return ids

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self._ids(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids if i < self.vocab)

    def raw(self, id: int) -> bytes:
        return self.decode([id]).encode("utf-8")

    def spans(self, texts: Sequence[str]) -> list[tuple[list[int], Spans]]:
        return [(self.encode(text), [(i, i + 1) for i in range(len(text))]) for text in texts]

    def encode_corpus(self, corpus: Corpus) -> Iterator[NDArray[Any]]:
        return (self._ids(chunk) for chunk in corpus.text())

    def description(self) -> dict[str, Any]:
        return {"kind": "chars", "characters": self.characters}

    def special(self, *names: str) -> int | None:
        return None


@dataclass(frozen=True)
class JsonTokenizer:
    """A tokenizer.json of the ``tokenizers`` library, held as its text."""

    text: str
    where: str = field(default="tokenizer.json", compare=False)

    @cached_property
    def _backend(self) -> "Backend":
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(self.text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{self.where!r} is not a tokenizer.json: {error}.") from None
        backend.no_padding()
        backend.no_truncation()
        return backend

    @cached_property
    def vocab(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([i for i in ids if i < self.vocab], skip_special_tokens=True))

    def raw(self, id: int) -> bytes:
        piece = self._backend.id_to_token(id) or ""
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # of a vocabulary that falls back to bytes
            return bytes.fromhex(byte[1])
        if "\N{REPLACEMENT CHARACTER}" in self.decode([id]) and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        return self.decode([id]).encode("utf-8", "replace")

    def spans(self, texts: Sequence[str]) -> list[tuple[list[int], Spans]]:
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(list(encoding.ids), list(encoding.offsets)) for encoding in encodings]

    def encode_corpus(self, corpus: Corpus) -> Iterator[NDArray[Any]]:
        for chunk in corpus.text():
            lines = chunk.splitlines(keepends=True)
            pieces = ["".join(lines[i : i + 500]) for i in range(0, len(lines), 500)]  # encoded side by side
            for encoding in self._backend.encode_batch_fast(pieces, add_special_tokens=False):
                yield np.asarray(encoding.ids, np.uint32)

    def description(self) -> dict[str, Any]:
        return {"kind": "json", "json": self.text}

    def special(self, *names: str) -> int | None:
        ids = (self._backend.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)


def from_description(description: Mapping[str, Any]) -> Tokenizer:
    """The tokeniser that ``Tokenizer.description`` described. Raises UserError when it is none."""
    match description:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "chars", "characters": str(characters)}:
            return CharTokenizer(characters)
        case {"kind": "json", "json": str(text)}:
            return JsonTokenizer(text)
    raise UserError(f"not the description of a tokeniser: {str(dict(description))[:80]}.")


def open_tokenizer(name: str) -> Tokenizer:
    """ "bytes", or the path of a tokenizer.json or of a folder that holds one. Raises UserError when there is none."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = JsonTokenizer(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"no tokeniser {name!r}: give 'bytes' or the path of a tokenizer.json.") from None
    if not tokenizer.vocab:
        raise UserError(f"the tokeniser {str(path)!r} has an empty vocabulary.")
    return tokenizer


def corpus_tokenizer(name: str, vocab: int, corpus: Corpus) -> Tokenizer:
    """The tokeniser ``name`` fitted to a corpus: "chars" and "bpe" (of ``vocab`` ids) take their vocabulary from it."""
    if name == "chars":
        return CharTokenizer("".join(sorted({character for chunk in corpus.text() for character in set(chunk)})))
    if name == "bpe":
        file = f"bpe-{vocab}-{corpus.sha256[:24]}.tokenizer.json"
        path = cached(file, lambda path: _train_bpe(corpus, vocab, path), lambda path: _is_bpe(path, vocab))
        return JsonTokenizer(path.read_text(encoding="utf-8"), str(path))
    if name not in NAMES and not Path(name).expanduser().exists():
        near = get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"give {', '.join(NAMES)} or the path of a tokenizer.json."
        raise UserError(f"no tokeniser {name!r}: {hint}")
    return open_tokenizer(name)


def _train_bpe(corpus: Corpus, vocab: int, path: Path) -> None:
    """Byte-level byte-pair encoding (Sennrich et al., 2016; on bytes: Radford et al., 2019)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(corpus.text(), trainer)
    path.write_text(backend.to_str(), encoding="utf-8")


def _is_bpe(path: Path, vocab: int) -> bool:
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        return model["type"] == "BPE" and 256 <= len(model["vocab"]) <= vocab
    except (ValueError, KeyError, TypeError):
        return False
