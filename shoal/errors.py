"""The errors that Shoal raises, and the one way to suggest a nearest name."""

from collections.abc import Iterable
from difflib import get_close_matches


class ShoalError(Exception):
    """Something went wrong that one line can explain. The CLI prints it and exits 1."""


class UserError(ShoalError):
    """The input cannot be used: says what, where and what to do. The CLI prints it and exits 2."""


class RunFailed(ShoalError):
    """A run stopped before its end; the message names rank, host, step and cause."""


def unknown_name(what: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """An error for a misspelt name: says what was not known, where, and the nearest name or all of them."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(choices) or 'none'}."
    return UserError(f"unknown {what} {name!r}{f' in {where}' if where else ''}: {hint}")
