"""A tokenised corpus: made once, kept in the cache folder as a flat file of ids, and mapped into memory."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data.cache import cached
from shoal.data.corpus import Corpus
from shoal.data.tokenizer import Tokenizer

DIGEST_BYTES = 32


@dataclass(frozen=True)
class Tokens:
    """``ids`` is a read-only memory map of the smallest unsigned type that holds the vocabulary; [tokens]."""

    ids: NDArray[Any]
    sha256: str


def tokenise(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """All ids of the corpus, from the cache or into it: the key is what the text and the tokeniser are, not where.

    The file is the ids followed by their SHA-256, so that a file cut short or damaged is seen and made again."""
    dtype = np.dtype(next(t for t in (np.uint8, np.uint16, np.uint32) if tokenizer.vocab - 1 <= np.iinfo(t).max))
    words = f"{corpus.sha256} {json.dumps(tokenizer.description(), sort_keys=True)}"
    key = hashlib.sha256(words.encode()).hexdigest()
    path = cached(
        f"tokens-{key[:40]}.{dtype.name}.bin",
        lambda path: _write(path, (ids.astype(dtype, copy=False) for ids in tokenizer.encode_corpus(corpus))),
        _whole,
    )
    size = path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        file.seek(size)
        digest = file.read(DIGEST_BYTES).hex()
    count = size // dtype.itemsize
    return Tokens(np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype), digest)


def _write(path: Path, parts: Iterable[NDArray[Any]]) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part.tobytes())
            digest.update(part.tobytes())
        file.write(digest.digest())


def _whole(path: Path) -> bool:
    digest = hashlib.sha256()
    left = path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        while left > 0:
            chunk = file.read(min(left, 1 << 20))
            digest.update(chunk)
            left -= len(chunk)
        return left == 0 and file.read() == digest.digest()
