"""How text is generated: what `shoal serve --generation KEY=VALUE` takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from shoal.errors import UserError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Options:
    """How text is generated. None of them but ``precision`` and ``kernels`` changes a bit of what comes out."""

    cache_bytes: int = 0  # for keys and values; 0: as much as ``running`` sequences of the whole context, at most 1 GiB
    running: int = 64  # sequences that hold cache at a time
    prompt_rows: int = 512  # tokens of prompts in a step where nobody waits for a next token
    stretch: float = 1.45  # a step with prompts takes at most so many times as long as one without
    precision: Literal["float32", "bfloat16"] = "float32"  # of the weights; sums are float32
    kernels: Literal["auto", "native", "torch"] = "auto"  # auto: native where the C++ parts are there and on a CPU
    threads: int = 1
    speculate: int = 0  # guess so many tokens, and check them in one step; 0: do not, or 4 with a draft
    draft: str = ""  # a small model that guesses (a run or a folder); "": what repeats in the text is guessed

    def __post_init__(self) -> None:
        for name in ("running", "prompt_rows", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"generation option {name} must be at least 1, got {getattr(self, name)}.")
        if self.cache_bytes < 0 or self.speculate < 0 or self.stretch < 1:
            raise UserError("generation options: cache_bytes and speculate from 0, stretch from 1.")
        for name, known in (("precision", ("float32", "bfloat16")), ("kernels", ("auto", "native", "torch"))):
            if getattr(self, name) not in known:
                raise unknown_name(f"generation option {name}", str(getattr(self, name)), known)


def options_from(values: Mapping[str, Any]) -> Options:
    """Raises UserError for names that are not among the options."""
    known = {each.name for each in fields(Options)}
    for name in values:
        if name not in known:
            raise unknown_name("generation option", name, known)
    return Options(**values)


def options_from_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """The values of ``KEY=VALUE`` words, of the options' types. Raises UserError for what is no option's value."""
    types: dict[str, type] = {each.name: type(each.default) for each in fields(Options)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name not in types:
            raise unknown_name("generation option", name, types)
        try:
            values[name] = types[name](text)
        except ValueError:
            equals = ""
        if not equals:
            raise UserError(f"--generation {pair!r}: write {name}=VALUE, a {types[name].__name__}.")
    options_from(values)
    return values
