"""A task's loss, which knows of one whole model, over a model that is in pieces."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from shoal.data.source import Batch
from shoal.errors import UserError
from shoal.parallel.partition.arguments import bind


class _Called(Exception):
    """The loss has called the model: no more is wanted of it."""


class StandIn:
    """What a task takes for the model: calls go to ``answer``, with the arguments by name; the rest is the model's."""

    def __init__(self, model: nn.Module, answer: Callable[[dict[str, Any]], Any]) -> None:
        self._model, self._answer, self._calls = model, answer, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        if self._calls > 1:
            raise UserError("the loss calls the model twice for one batch, and a pipeline runs it once: call it once.")
        return self._answer(bind(self._model, args, kwargs).arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def arguments_of(ask: Callable[[Any, Batch], Any], model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a task's loss or measure calls the model with, by name; all that comes before the call is done."""
    found: dict[str, Any] = {}

    def answer(arguments: dict[str, Any]) -> Any:
        found.update(arguments)
        raise _Called

    try:
        ask(StandIn(model, answer), batch)
    except _Called:
        return found
    raise UserError(f"the {inspect.unwrap(ask).__qualname__} never calls the model: a pipeline cannot run it.")
