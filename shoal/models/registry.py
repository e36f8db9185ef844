"""Every kind of model that a recipe can name, and the tasks that each can be trained for."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.data.reference import resolve
from shoal.errors import UserError, unknown_name
from shoal.models.bert import Bert, BertConfig, Head
from shoal.models.cnn import CNN, CNNConfig
from shoal.models.elmo import Elmo, ElmoConfig
from shoal.models.facts import fill
from shoal.models.first_values import Blank, blank, materialise
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.huggingface import read_config
from shoal.models.initial_weights import GivenWeights, load_weights
from shoal.models.lstm import LSTM, LSTMConfig
from shoal.models.mlp import MLP, MLPConfig
from shoal.models.moe import MoE, MoEConfig
from shoal.models.on_meta import on_meta
from shoal.models.resnet import ResNet, ResNetConfig
from shoal.models.task import Task
from shoal.models.tasks.classification import Classification
from shoal.models.tasks.custom import CustomLoss
from shoal.models.tasks.language_model import BidirectionalLanguageModel, LanguageModel
from shoal.models.tasks.masked_language_model import MaskedLanguageModel
from shoal.models.tasks.question_answering import QuestionAnswering
from shoal.models.tasks.regression import Regression
from shoal.recipe.recipe import ModelSpec
from shoal.recipe.typed import from_mapping

Facts = Mapping[str, Any]


def _masked(spec: ModelSpec, facts: Facts) -> MaskedLanguageModel:
    vocab = facts.get("vocab") or spec.options.get("vocab")
    if not vocab:
        raise UserError("task 'masked-language-model' needs 'vocab', and the data does not tell it: set model.vocab.")
    given = spec.options.get("mask_token", -1)
    mask_token = given if given >= 0 else facts.get("mask_token", vocab)
    return MaskedLanguageModel(vocab, mask_token, tuple(facts.get("special", ())), facts.get("context", 0))


TASKS: dict[str, Callable[[ModelSpec, Facts], Task]] = {
    "language-model": lambda spec, facts: LanguageModel(),
    "bidirectional-language-model": lambda spec, facts: BidirectionalLanguageModel(),
    "masked-language-model": _masked,
    "classification": lambda spec, facts: Classification(),
    "regression": lambda spec, facts: Regression(),
    "question-answering": lambda spec, facts: QuestionAnswering(),
}


@dataclass(frozen=True)
class Kind:
    build: Callable[[ModelSpec, Facts], nn.Module]
    tasks: tuple[str, ...]  # the usual one for data with classes stands first, that for other data last


def build(spec: ModelSpec, facts: Facts) -> nn.Module:
    """The model with the first values that torch's seed gives, on the CPU; on the meta device if that is the default.

    ``facts`` (``Source.facts``) fills the sizes that the recipe leaves out. Weights and frozen parameters are applied.
    Raises UserError for an unknown kind, task or option, for sizes that contradict the data, for weights that do not
    fit, and for a freeze pattern that fits no parameter."""
    if torch.get_default_device().type == "meta":
        model = outline(spec, facts)
        if spec.weights:
            load_weights(model, Path(spec.weights))
        return model
    found = build_blank(spec, facts)
    if found is not None:
        materialise([found.module], found.first)
        return found.module
    model = _kind(spec).build(spec, facts)
    if spec.weights:
        load_weights(model, Path(spec.weights))
    _freeze(model, spec.freeze)
    return model


def outline(spec: ModelSpec, facts: Facts) -> nn.Module:
    """The model on the meta device: names, shapes and what is frozen. Nothing is allocated, no weights are read.

    Raises UserError as `build` does."""
    found = build_blank(spec, facts)
    if found is not None:
        return found.module
    with on_meta():
        model = _kind(spec).build(spec, facts)
    if spec.weights:
        GivenWeights(model, Path(spec.weights))
    _freeze(model, spec.freeze)
    return model


def build_blank(spec: ModelSpec, facts: Facts) -> Blank | None:
    """The model without memory, and where its first values come from; None for a custom one that does not say them.

    Raises UserError as `build` does."""
    task_name(spec, facts)
    kind = _kind(spec)
    made = blank(lambda: kind.build(spec, facts))
    if made is None:
        return None
    given = GivenWeights(made.module, Path(spec.weights)) if spec.weights else None
    _freeze(made.module, spec.freeze)
    return Blank(made.module, made.first.over(given))


def task_for(spec: ModelSpec, facts: Facts) -> Task:
    """The task that the recipe names, or the usual one of its model. Raises UserError when they do not fit."""
    name = task_name(spec, facts)
    if spec.loss:
        return CustomLoss(resolve(spec.loss, "model.loss"), spec.loss)
    return TASKS[name](spec, facts)


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
    if facts.get("outputs") and "regression" not in kind.tasks:
        raise UserError(f"the data's target is a number, and a model of kind {spec.kind!r} does not do regression.")
    classes = facts.get("classes") or spec.options.get("classes")
    return kind.tasks[0] if classes else kind.tasks[-1]


def _kind(spec: ModelSpec) -> Kind:
    if spec.kind not in KINDS:
        if ":" in spec.kind:
            raise UserError(
                f"model.kind {spec.kind!r} names a function: write kind = 'custom', factory = {spec.kind!r}."
            )
        raise unknown_name("model kind", spec.kind, KINDS, "model.kind")
    return KINDS[spec.kind]


def _options(cls: type[Any], spec: ModelSpec) -> Any:
    """The kind's config; sizes that the recipe leaves out come from the folder of the weights, where there is one."""
    folder = Path(spec.weights)
    known: Mapping[str, Any] = {}
    if spec.weights and spec.kind in ("bert", "gpt") and (folder / "config.json").exists():
        config = read_config(folder)
        if config.kind != spec.kind:
            raise UserError(f"{spec.weights!r} holds a {config.kind} model, not a {spec.kind}.")
        known = {name: value for name, value in config.options.items() if name != "classes"}
    return from_mapping(cls, {**known, **spec.options}, f"[model] of kind {spec.kind!r}")


def _gpt(spec: ModelSpec, facts: Facts) -> nn.Module:
    return GPT(fill(_options(GPTConfig, spec), facts, at_least=("vocab", "context")))


def _moe(spec: ModelSpec, facts: Facts) -> nn.Module:
    return MoE(fill(_options(MoEConfig, spec), facts, at_least=("vocab", "context")))


def _lstm(spec: ModelSpec, facts: Facts) -> nn.Module:
    config = _options(LSTMConfig, spec)
    known = ("vocab", "context") if config.context or facts.get("context") else ("vocab",)
    return LSTM(fill(config, facts, at_least=known))


def _elmo(spec: ModelSpec, facts: Facts) -> nn.Module:
    config = _options(ElmoConfig, spec)
    known = ("vocab", "context") if config.context or facts.get("context") else ("vocab",)
    return Elmo(fill(config, facts, at_least=known))


def _bert(spec: ModelSpec, facts: Facts) -> nn.Module:
    config = _options(BertConfig, spec)
    head = _BERT_HEADS[task_name(spec, facts)]
    sizes = ("vocab", "context", "classes") if head == "classification" else ("vocab", "context")
    if head == "masked-language-model":
        facts = {**facts, "vocab": max(facts.get("vocab", 0), _masked(spec, facts).mask_token + 1)}
    return Bert(fill(config, facts, at_least=sizes), head)


_BERT_HEADS: dict[str, Head] = {
    "masked-language-model": "masked-language-model",
    "classification": "classification",
    "question-answering": "question-answering",
    "custom": "encoder",
}


def _resnet(spec: ModelSpec, facts: Facts) -> nn.Module:
    return ResNet(fill(_options(ResNetConfig, spec), facts, equal=("shape",), at_least=("classes",)))


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
    "resnet": Kind(_resnet, ("classification",)),
    "lstm": Kind(_lstm, ("language-model",)),
    "elmo": Kind(_elmo, ("bidirectional-language-model",)),
    "bert": Kind(_bert, ("classification", "question-answering", "masked-language-model")),
    "gpt": Kind(_gpt, ("language-model",)),
    "moe": Kind(_moe, ("language-model",)),
    "custom": Kind(_custom, tuple(TASKS)),
}
