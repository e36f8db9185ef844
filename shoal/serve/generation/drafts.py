"""Guesses of the next tokens, for a model to check several at once (Leviathan et al., 2023). A wrong one costs time."""

from collections.abc import Sequence

WINDOW = 1024  # tokens that are searched, from the end


def repetition(tokens: Sequence[int], count: int) -> list[int]:
    """What followed the last time that the text's last three, two or one tokens stood there (Saxena, 2023).

    At most ``count`` tokens, none where nothing repeats."""
    text = list(tokens[-WINDOW:])
    for length in (3, 2):
        if len(text) <= length:
            continue
        tail = text[-length:]
        for at in range(len(text) - length - 1, -1, -1):
            if text[at] == tail[0] and text[at : at + length] == tail:
                return text[at + length : at + length + count]
    return []
