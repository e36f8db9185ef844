"""Every kind of model that a recipe can name, and the tasks that each can be trained for."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from shoal.errors import UserError, unknown_name
from shoal.models.cnn import CNN, CNNConfig
from shoal.models.facts import fill
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.lstm import LSTM, LSTMConfig
from shoal.models.mlp import MLP, MLPConfig
from shoal.models.reference import resolve
from shoal.models.task import Task
from shoal.models.tasks.classification import Classification
from shoal.models.tasks.custom import CustomLoss
from shoal.models.tasks.language_model import BidirectionalLanguageModel, LanguageModel
from shoal.models.tasks.regression import Regression
from shoal.recipe.recipe import ModelSpec
from shoal.recipe.typed import from_mapping

Facts = Mapping[str, Any]
TASKS: dict[str, Callable[[], Task]] = {
    task.name: task for task in (LanguageModel, BidirectionalLanguageModel, Classification, Regression)
}


@dataclass(frozen=True)
class Kind:
    build: Callable[[ModelSpec, Facts], nn.Module]
    tasks: tuple[str, ...]  # that it can be trained for; the first is the usual one


def build(spec: ModelSpec, facts: Facts) -> nn.Module:
    """The model on the CPU, initialised from torch's default generator as it stands: the caller seeds it.

    ``facts`` (``Source.facts``) fills the sizes that the recipe leaves out. Weights and frozen parameters are applied.
    Raises UserError for an unknown kind, task or option, for sizes that contradict the data, for weights that do not
    fit, and for a freeze pattern that fits no parameter."""
    task_name(spec, facts)
    model = _kind(spec).build(spec, facts)
    _freeze(model, spec.freeze)
    return model


def task_for(spec: ModelSpec, facts: Facts) -> Task:
    """The task that the recipe names, or the usual one of its model. Raises UserError when they do not fit."""
    name = task_name(spec, facts)
    if spec.loss:
        return CustomLoss(resolve(spec.loss, "model.loss"), spec.loss)
    return TASKS[name]()


def task_name(spec: ModelSpec, facts: Facts) -> str:
    """The name of the task; "custom" where the recipe brings its own loss. Raises UserError when it does not fit."""
    kind = _kind(spec)
    if spec.task and spec.task not in TASKS:
        raise unknown_name("task", spec.task, TASKS, "model.task")
    if spec.task and spec.task not in kind.tasks:
        raise UserError(f"a model of kind {spec.kind!r} cannot do task {spec.task!r}: it does {', '.join(kind.tasks)}.")
    if spec.task:
        return spec.task
    if spec.loss:
        return "custom"
    if spec.kind == "custom":
        raise UserError("model.kind 'custom' needs model.task or model.loss = 'module:function'.")
    if "regression" in kind.tasks and not facts.get("classes") and not spec.options.get("classes"):
        return "regression"
    return kind.tasks[0]


def _kind(spec: ModelSpec) -> Kind:
    if spec.kind not in KINDS:
        raise unknown_name("model kind", spec.kind, KINDS, "model.kind")
    return KINDS[spec.kind]


def _options(cls: type[Any], spec: ModelSpec) -> Any:
    return from_mapping(cls, spec.options, f"[model] of kind {spec.kind!r}")


def _gpt(spec: ModelSpec, facts: Facts) -> nn.Module:
    return GPT(fill(_options(GPTConfig, spec), facts, at_least=("vocab", "context")))


def _lstm(spec: ModelSpec, facts: Facts) -> nn.Module:
    config = _options(LSTMConfig, spec)
    known = ("vocab", "context") if config.context or facts.get("context") else ("vocab",)
    return LSTM(fill(config, facts, at_least=known))


def _cnn(spec: ModelSpec, facts: Facts) -> nn.Module:
    return CNN(fill(_options(CNNConfig, spec), facts, equal=("shape",), at_least=("classes",)))


def _mlp(spec: ModelSpec, facts: Facts) -> nn.Module:
    config = _options(MLPConfig, spec)
    shape = facts.get("shape")
    facts = {"features": math.prod(shape), **facts} if shape else facts
    if task_name(spec, facts) == "regression":
        return MLP(fill(config, {"outputs": 1, **facts}, equal=("features", "outputs")))
    return MLP(fill(config, facts, equal=("features",), at_least=("classes",)))


def _custom(spec: ModelSpec, facts: Facts) -> nn.Module:
    if not spec.factory:
        raise UserError("model.kind 'custom' needs model.factory = 'module:function'.")
    factory = resolve(spec.factory, "model.factory")
    signature = inspect.signature(factory)
    open_parameters = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.name not in spec.options
    ]
    arguments = (facts,) if open_parameters else ()
    try:
        signature.bind(*arguments, **spec.options)
    except TypeError as error:
        raise UserError(
            f"model.factory {spec.factory!r} does not take the facts of the data and the options of [model]: {error}."
        ) from None
    model = factory(*arguments, **spec.options)
    if not isinstance(model, nn.Module):
        raise UserError(f"model.factory {spec.factory!r} must return an nn.Module, it returned {type(model).__name__}.")
    return model


def _freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            near = get_close_matches(pattern, parameters, n=1, cutoff=0.0)
            raise UserError(f"model.freeze: no parameter fits {pattern!r}; the nearest is {near[0]!r}.")
        for name in matched:
            parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"model.freeze = {list(patterns)} leaves no parameter to train.")


KINDS: dict[str, Kind] = {
    "mlp": Kind(_mlp, ("classification", "regression")),
    "cnn": Kind(_cnn, ("classification",)),
    "lstm": Kind(_lstm, ("language-model",)),
    "gpt": Kind(_gpt, ("language-model",)),
    "custom": Kind(_custom, tuple(TASKS)),
}
