"""From a recipe and the data's facts to a model and its task."""

import pytest
import torch
from torch import nn

from shoal.errors import UserError
from shoal.models.registry import build, task_for, task_name
from shoal.recipe.recipe import ModelSpec

TEXT = {"vocab": 65, "context": 16}
TINY_GPT = {"layers": 1, "heads": 1, "width": 8}


def _gpt(**fields: object) -> ModelSpec:
    return ModelSpec(kind="gpt", options=TINY_GPT, **fields)


def test_sizes_that_the_recipe_leaves_out_come_from_the_data():
    model = build(_gpt(), TEXT)
    assert (model.config.vocab, model.config.context) == (65, 16)


def test_a_built_model_depends_on_the_seed_and_not_on_what_was_drawn_since():
    torch.manual_seed(5)
    first = build(_gpt(), TEXT)
    torch.rand(3)
    again = build(_gpt(), TEXT)
    torch.manual_seed(6)
    other = build(_gpt(), TEXT)
    assert torch.equal(first.tokens.weight, again.tokens.weight)
    assert not torch.equal(first.tokens.weight, other.tokens.weight)
    assert {parameter.device.type for parameter in first.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("spec", "facts", "said"),
    [
        (ModelSpec(kind="gtp"), {}, "unknown model kind 'gtp' in model.kind: did you mean 'gpt'?"),
        (ModelSpec(kind="mine:make"), {}, "names a function: write kind = 'custom', factory = 'mine:make'."),
        (ModelSpec(options={"layer": 3}), TEXT, "unknown key 'layer' in [model] of kind 'gpt': did you mean 'layers'?"),
        (
            ModelSpec(options={"layers": "3"}),
            TEXT,
            "'layers' in [model] of kind 'gpt' must be a whole number, got '3'.",
        ),
        (ModelSpec(options={"layers": 0}), TEXT, "model.layers must be at least 1, got 0."),
        (ModelSpec(options={"dropout": 1.0}), TEXT, "model.dropout must be at least 0 and less than 1, got 1.0."),
        (ModelSpec(), {"context": 3}, "the model needs 'vocab' and the data does not tell it: set model.vocab in"),
        (ModelSpec(options={"vocab": 64}), TEXT, "model.vocab = 64 is less than the 65 of the data"),
        (ModelSpec(options={"context": 8}), TEXT, "model.context = 8 is less than the 16 of the data"),
        (
            ModelSpec(kind="mlp", options={"features": 3}),
            {"features": 4, "classes": 2},
            "model.features = 3 but the data has 4: leave model.features out",
        ),
        (ModelSpec(kind="cnn"), {"shape": (1, 2, 3, 4), "classes": 2}, "[channels, height, width], the data has [1, 2"),
        (ModelSpec(task="language"), TEXT, "unknown task 'language' in model.task: did you mean 'language-model'?"),
        (ModelSpec(task="regression"), TEXT, "a model of kind 'gpt' cannot do task 'regression': it does language-mod"),
        (ModelSpec(kind="bert"), {**TEXT, "outputs": 1}, "the data's target is a number, and a model of kind 'bert'"),
        (ModelSpec(kind="custom"), {}, "model.kind 'custom' needs model.task or model.loss"),
        (ModelSpec(kind="custom", task="regression"), {}, "model.kind 'custom' needs model.factory"),
        (_gpt(freeze=("block.*",)), TEXT, "model.freeze: no parameter fits 'block.*'; the nearest is 'blocks.0."),
        (_gpt(freeze=("tokens.*", "*")), TEXT, "leaves no parameter to train"),
        (_gpt(weights="nowhere"), TEXT, "no file or folder 'nowhere': check model.weights."),
    ],
)
def test_a_mistake_in_the_recipe_is_one_line_that_says_what_and_where(spec, facts, said):
    with pytest.raises(UserError) as error:
        build(spec, facts)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "facts", "name"),
    [
        ("gpt", TEXT, "language-model"),
        ("elmo", TEXT, "bidirectional-language-model"),
        ("bert", TEXT, "masked-language-model"),
        ("bert", {**TEXT, "classes": 3}, "classification"),
        ("mlp", {"features": 3, "classes": 2}, "classification"),
        ("mlp", {"features": 3, "outputs": 2}, "regression"),
        ("mlp", {"features": 3}, "regression"),
        ("cnn", {"shape": (8, 8), "classes": 2}, "classification"),
    ],
)
def test_without_a_task_the_kind_and_the_data_choose_it(kind, facts, name):
    assert task_for(ModelSpec(kind=kind), facts).name == name


def test_frozen_parameters_are_those_whose_names_fit():
    model = build(_gpt(freeze=("tokens.*", "blocks.0.norm?.*")), TEXT)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    norms = {f"blocks.0.norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert frozen == {"tokens.weight"} | norms


@pytest.mark.parametrize(
    ("facts", "options", "vocab", "mask_token"),
    [
        (TEXT, {}, 66, 65),  # the tokeniser has none: the first id after its own
        ({**TEXT, "mask_token": 4}, {}, 65, 4),
        ({**TEXT, "mask_token": 80}, {}, 81, 80),
        (TEXT, {"mask_token": 7}, 65, 7),
        (TEXT, {"vocab": 100}, 100, 65),
    ],
)
def test_the_mask_token_lies_inside_the_models_vocabulary(facts, options, vocab, mask_token):
    spec = ModelSpec(kind="bert", task="masked-language-model", options={**TINY_GPT, **options})
    assert build(spec, facts).config.vocab == vocab
    task = task_for(spec, facts)
    assert (task.vocab, task.mask_token) == (65, mask_token)


MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, facts, width=3):
        super().__init__()
        self.layer = torch.nn.Linear(facts["features"], width)
    def forward(self, input):
        return self.layer(input)

def alone(): return torch.nn.Linear(2, 2)
def sized(width, depth): return torch.nn.Linear(width, depth)
def nothing(): return None
def loss(model, batch):
    return model(batch["input"]).sum(), len(batch["input"])
number = 3
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    (tmp_path / "own_code_of_a_user.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_code_of_a_user"


@pytest.mark.parametrize(
    ("factory", "options", "shape"),
    [
        ("Net", {}, (3, 5)),
        ("Net", {"width": 7}, (7, 5)),
        ("alone", {}, (2, 2)),
        ("sized", {"width": 4, "depth": 6}, (6, 4)),
    ],
)
def test_any_module_can_be_built_with_the_facts_if_it_takes_them_and_the_options(own_code, factory, options, shape):
    spec = ModelSpec(kind="custom", factory=f"{own_code}:{factory}", loss=f"{own_code}:loss", options=options)
    model = build(spec, {"features": 5})
    assert {tuple(p.shape) for p in model.parameters() if p.dim() == 2} == {shape}
    task = task_for(spec, {"features": 5})
    assert task_name(spec, {}) == task.name == "custom"
    _, count = task.loss(model, {"input": torch.zeros(2, shape[1])})
    assert count == 2


def test_a_module_of_the_users_own_can_be_trained_for_a_task_that_is_known(own_code):
    spec = ModelSpec(kind="custom", factory=f"{own_code}:Net", task="classification")
    model, task = build(spec, {"features": 5}), task_for(spec, {})
    assert isinstance(model, nn.Module)
    _, count = task.loss(model, {"input": torch.zeros(2, 5), "target": torch.tensor([0, 2])})
    assert count == 2


@pytest.mark.parametrize(
    ("factory", "options", "said"),
    [
        ("Nett", {}, "did you mean 'Net'?"),
        ("number", {}, "not a function"),
        ("nothing", {}, "must return an nn.Module, it returned NoneType"),
        ("Net", {"wide": 3}, "got an unexpected keyword argument 'wide'"),
        ("sized", {}, "missing a required argument: 'depth'"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused_in_one_line(own_code, factory, options, said):
    spec = ModelSpec(kind="custom", factory=f"{own_code}:{factory}", task="regression", options=options)
    with pytest.raises(UserError) as error:
        build(spec, {"features": 5})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
