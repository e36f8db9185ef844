"""Folders that can be called: `shoal.train` is both the folder of the training code and what a program calls."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class Verb(ModuleType):
    """A package whose call is that of the function of its own name in its ``api`` module, imported when called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        function = getattr(import_module(f"{self.__name__}.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **options)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """By name, as picklers of functions do with modules: functions that name `shoal.train` are sent to workers."""
        return import_module, (self.__name__,)


def make_verb(package: str) -> None:
    """Called by the package's own ``__init__``, with its name."""
    sys.modules[package].__class__ = Verb
