"""The tokens that stand for no text: padding, the start of a sequence, the end of a part, a hidden token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.data.tokenizer import Tokenizer

PAD = ("[PAD]", "<pad>")
START = ("[CLS]", "<s>")
SEPARATOR = ("[SEP]", "</s>")
MASK = ("[MASK]", "<mask>")


@dataclass(frozen=True)
class SpecialTokens:
    pad: int
    start: int
    separator: int
    mask: int
    vocab: int  # of the tokeniser, and those above that it lacks

    def facts(self, tokenizer: Tokenizer, context: int) -> dict[str, Any]:
        return {
            "vocab": self.vocab,
            "context": context,
            "pad": self.pad,
            "mask_token": self.mask,
            "special": [self.pad, self.start, self.separator],
            "tokenizer": tokenizer.description(),
        }

    def framed(self, ids: Sequence[int], context: int) -> list[int]:
        """[start] ids [separator], the ids cut so that no more than ``context`` tokens come out."""
        return [self.start, *ids[: context - 2], self.separator]


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The tokeniser's own, where it has them under their usual names; the others get the ids after its vocabulary."""
    vocab = tokenizer.vocab
    ids = []
    for names in (PAD, START, SEPARATOR, MASK):
        known = tokenizer.special(*names)
        ids.append(vocab if known is None else known)
        vocab += known is None
    pad, start, separator, mask = ids
    return SpecialTokens(pad, start, separator, mask, vocab)
