"""argparse whose errors are one line with the nearest option, raised as UserError."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from shoal.errors import UserError, unknown_name
from shoal.recipe.layers import keys_named


def folder(text: str) -> Path:
    """The type of an argument that names a folder: "", of an unset shell variable, is not the working directory."""
    if not text:
        raise ArgumentTypeError("it is empty: name a folder, or leave it out")
    return Path(text)


class OneLineParser(ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` shows the options.")

    def refuse(self, extra: Sequence[str]) -> None:
        """Raises UserError naming the first argument that the verb does not know, with the nearest option."""
        for argument in extra:
            if argument.startswith("-"):
                option = argument.split("=")[0]
                name = option.lstrip("-").replace("-", "_")
                keys = keys_named(name) if "--set" in self._option_string_actions else []
                if keys:
                    written = " or ".join(f"--set {key}=VALUE" for key in keys)
                    raise UserError(f"unknown option {option!r} in `{self.prog}`: write {written}.")
                raise unknown_name("option", option, self._option_string_actions, f"`{self.prog}`")
        if extra:
            self.error(f"unexpected argument {extra[0]!r}")
