"""The tokens of words that have come before: most texts are made of few words, and a tokeniser takes long for each."""

import json
from array import array
from collections.abc import Mapping
from typing import Any

from shoal.data.tokenizer import JsonTokenizer, Tokenizer

MOST_WORDS = 1 << 15  # then all are forgotten: which ones come is the clients' choice
LONGEST = 32  # characters; longer words seldom come again
ID_BYTES = 4
_CUTS_AT_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_BY_CHARACTER = {"BertNormalizer", "Lowercase"}


def stands_alone(tokenizer: Tokenizer) -> bool:
    """Whether a text's tokens are those of its pieces between spaces, one after the other: the tokeniser cuts at every
    space, drops it, and looks at nothing beyond it."""
    if not isinstance(tokenizer, JsonTokenizer):
        return False
    parts: Mapping[str, Any] = json.loads(tokenizer.text)
    cuts, normalizer = parts.get("pre_tokenizer") or {}, parts.get("normalizer") or {}
    return (
        cuts.get("type") in _CUTS_AT_SPACES
        and (not normalizer or normalizer.get("type") in _BY_CHARACTER)
        and not (parts.get("model") or {}).get("dropout")
        and not any(" " in one["content"] for one in parts.get("added_tokens") or ())
    )


class Words:
    """A tokeniser for which `stands_alone` holds: its ids, found word by word."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, bytes] = {}

    def ids(self, text: str) -> bytes:
        """The ids of a text as int32 in the machine's order. Raises UserError as the tokeniser does."""
        words = text.split(" ")
        try:
            return b"".join(map(self._known.__getitem__, words))
        except KeyError:
            pass
        found = self._of(list({word: None for word in words if word not in self._known}))
        if len(self._known) + len(found) > MOST_WORDS:
            self._known.clear()
            found |= self._of(list({word: None for word in words if word not in found}))
        self._known |= {word: ids for word, ids in found.items() if len(word) <= LONGEST}
        return b"".join([found[word] if word in found else self._known[word] for word in words])

    def _of(self, words: list[str]) -> dict[str, bytes]:
        """All at once: a call costs more than a word."""
        ((ids, spans),) = self._tokenizer.spans([" ".join(words)])
        made: dict[str, bytes] = {}
        at = end = 0
        for word in words:
            first, end = at, end + len(word)
            while at < len(ids) and spans[at][0] < end:
                at += 1
            made[word] = array("i", ids[first:at]).tobytes()
            end += 1  # the space
        return made
