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
    "train": "shoal.train.api",
    "launch": "shoal.train.api",
    "Worker": "shoal.train.worker",
    "evaluate": "shoal.train.api",
    "export": "shoal.train.api",
    "prove": "shoal.prove.api",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
