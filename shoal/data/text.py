"""Text for language models: windows of a token stream."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shoal.data.config import SourceConfig, at_least, read_config
from shoal.data.corpus import open_corpus
from shoal.data.ledger import Ids
from shoal.data.source import Batch, Splits
from shoal.data.special import MASK
from shoal.data.split import tail_ranges
from shoal.data.tokenizer import Tokenizer, corpus_tokenizer
from shoal.data.tokens import Tokens, tokenise
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec


@dataclass(frozen=True, kw_only=True)
class TextConfig(SourceConfig):
    tokenizer: str = "bytes"  # "bytes", "chars", "bpe", or the path of a tokenizer.json
    vocab: int = 4096  # ids of a "bpe" vocabulary; training it stops earlier when the text is short
    context: int = 128  # tokens that a sample predicts; it holds one more, the first one's input
    stride: int = 0  # tokens from a training sample to the next; 0: context. Held-out samples never overlap
    pattern: str = "*"  # which files of a folder, at any depth
    max_bytes: int = 0  # read at most so much text; 0: all of it (of the standard library 16 MiB)

    def __post_init__(self) -> None:
        at_least(1, context=self.context)
        at_least(0, stride=self.stride, max_bytes=self.max_bytes)
        at_least(256, vocab=self.vocab)


@dataclass(frozen=True)
class TextSource:
    """Windows of the token range ``span``, ``stride`` apart: {"tokens": int64 [n, context + 1]}.

    Positions 0 .. context - 1 are the input and 1 .. context what is predicted."""

    tokens: Tokens
    span: range
    tokenizer: Tokenizer
    context: int
    stride: int

    def __len__(self) -> int:
        return max(0, (len(self.span) - self.context - 1) // self.stride + 1)

    @property
    def facts(self) -> Mapping[str, Any]:
        facts = {"vocab": self.tokenizer.vocab, "context": self.context, "tokenizer": self.tokenizer.description()}
        masks = self.tokenizer.special(*MASK)
        return facts if masks is None else {**facts, "mask_token": masks}

    @property
    def fingerprint(self) -> str:
        words = f"text {self.tokens.sha256} {self.span.start} {self.span.stop} {self.context} {self.stride}"
        return hashlib.sha256(words.encode()).hexdigest()

    def fetch(self, ids: Ids, epoch: int) -> Batch:
        starts = self.span.start + np.asarray(ids, np.int64) * self.stride
        windows = self.tokens.ids[starts[:, None] + np.arange(self.context + 1)]
        return {"tokens": torch.from_numpy(windows.astype(np.int64))}


def open_text(spec: DataSpec, seed: int) -> Splits:
    """The text's first part to train on; its last parts are held out whole: no window of them is ever trained on.

    Raises UserError when there is no text, or too little of it for one window a part."""
    config = read_config(TextConfig, spec)
    corpus = open_corpus(spec.path, config.pattern, config.max_bytes)
    tokenizer = corpus_tokenizer(config.tokenizer, config.vocab, corpus)
    tokens = tokenise(corpus, tokenizer)

    def part(name: str, tokens: Tokens, span: range, stride: int = config.context) -> TextSource:
        if len(span) <= config.context:
            raise UserError(
                f"data: the {name} text has {len(span)} tokens, fewer than context + 1 = {config.context + 1}: "
                f"lower context, or change the held-out shares."
            )
        return TextSource(tokens, span, tokenizer, config.context, stride)

    if not len(tokens.ids):
        raise UserError(f"data: {spec.path!r} holds no text.")
    train, validation, test = tail_ranges(len(tokens.ids), spec.validation, spec.test)
    held = [part(name, tokens, span) if span else None for name, span in (("validation", validation), ("test", test))]
    if spec.test_path:
        apart = tokenise(open_corpus(spec.test_path, config.pattern, config.max_bytes), tokenizer)
        held[1] = part("test", apart, range(len(apart.ids)))
    return Splits(part("training", tokens, train, config.stride or config.context), *held)
