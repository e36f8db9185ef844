"""Shoal trains PyTorch models on any number of workers, with the same bits at any size.

Importing this package is quick: torch is imported when the first name that needs it is used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Cluster": "shoal.cluster.cluster",
    "Recipe": "shoal.recipe.recipe",
    "Plan": "shoal.recipe.plan",
    "Run": "shoal.run.run",
    "ShoalError": "shoal.errors",
    "UserError": "shoal.errors",
    "RunFailed": "shoal.errors",
    "Worker": "shoal.train.worker",
    "launch": "shoal.train.api",
    "evaluate": "shoal.train.api",
    "export": "shoal.train.api",
}
_VERBS = ("train", "prove", "serve")  # folders that can be called
__all__ = [*_HOME, *_VERBS]  # noqa: PLE0604  (all names are text)


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return import_module(f"shoal.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
