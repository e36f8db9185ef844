"""Tokens to text as they come, up to a stop string."""

from collections.abc import Sequence

from shoal.data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for bytes that are only the beginning of a character
MOST_HELD = 8  # tokens that may wait for the end of a character: what is longer will never be one


class TextStream:
    """The text of one answer. Nothing is given out that a later token could change or a stop string could take back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._before = 0  # tokens whose text is known; the one before them says whether a space comes first
        self._known = 0
        self._text = ""  # all that is known
        self._given = 0  # characters of it that were given out
        self.stopped = False  # a stop string came: the text ends before it

    @property
    def text(self) -> str:
        return self._text

    def feed(self, token: int) -> int:
        """Takes the next token; the number of characters that were known before it."""
        start = len(self._text)
        self._ids.append(token)
        whole = self._tokenizer.decode(self._ids[self._before :])
        old = self._tokenizer.decode(self._ids[self._before : self._known])
        if not whole.endswith(UNFINISHED) or len(self._ids) - self._known > MOST_HELD:
            self._text += whole[len(old) :]
            self._before, self._known = self._known, len(self._ids)
            self._look_for_stops(start)
        return min(start, len(self._text))

    def take(self, last: bool = False) -> str:
        """What can be given out now, and was not yet. ``last``: no token comes after this."""
        if last and not self.stopped:
            whole = self._tokenizer.decode(self._ids[self._before :])
            old = self._tokenizer.decode(self._ids[self._before : self._known])
            start = len(self._text)
            self._text += whole[len(old) :]
            self._before = self._known = len(self._ids)
            self._look_for_stops(start)
        end = len(self._text) if last or self.stopped else len(self._text) - self._held()
        new = self._text[self._given : end]
        self._given = max(self._given, end)
        return new

    def _look_for_stops(self, start: int) -> None:
        """The first stop string to begin among those that end at or after character ``start``."""
        found = [
            at for stop in self._stops if (at := self._text.find(stop, max(0, start - len(stop) + 1))) >= 0
        ]  # a stop string that lay before has ended the text then
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        for size in range(max(map(len, self._stops), default=1) - 1, 0, -1):
            if size <= len(self._text) and any(stop.startswith(self._text[-size:]) for stop in self._stops):
                return size
        return 0
