"""The standard list: what is in it, that plans of every kind agree, and the command that runs it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from prove_subjects import RECIPES, SAMPLES, data_of

from shoal.cli.main import main
from shoal.errors import UserError
from shoal.parallel.schedules.registry import MAKERS
from shoal.prove.api import check, fitting, prove, prove_standard
from shoal.prove.plans import FAMILIES, families, label, of_families
from shoal.prove.standard import KINDS, standard
from shoal.recipe.plan import Plan


def test_the_list_has_every_kind_of_model_and_of_plan():
    cases = standard()
    plans = [plan for case in cases for plan in case.plans]
    pages = [(Path(__file__).parents[2] / page).read_text(encoding="utf-8") for page in ("README.md", "docs/prove.md")]
    assert f"a standard list of {len(plans)} plans" in pages[0]
    assert f"each under the plans that split it: {len(plans)}\n" in pages[1]
    assert (
        {case.recipe.model.kind for case in cases}
        == {*KINDS}
        == {"mlp", "resnet", "lstm", "elmo", "bert", "gpt", "moe"}
    )
    assert {family for plan in plans for family in families(plan)} == set(FAMILIES)
    assert {plan.pipeline.schedule for plan in plans if plan.axes.size("pipe") > 1} == set(MAKERS)
    assert {plan.states for plan in plans} == {"auto", "zero1", "zero2", "zero3"}
    assert {plan.workers for plan in plans} >= {1, 2, 3, 4, 5, 8}
    assert max(plan.workers for plan in plans) == 8
    for case in cases:
        assert len(set(map(label, case.plans))) == len(case.plans), "no plan twice"
        assert case.wide == all(not plan.exact for plan in case.plans)
        for plan in case.plans:
            check(plan, case.recipe, case.model, case.data)


def proved(kind, family, agent, *, wide=False):
    """The first plan of the family, over three steps."""
    case = standard([kind])[wide]
    plan = of_families(case.plans, [family])[0]
    found = prove(case.recipe, steps=3, plans=[plan], model=case.model, data=case.data, agent=agent)
    assert (found["ok"], found["differences"]) == (True, [])
    return found["plans"][0]


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("kind", "family"), [("mlp", "tensor"), slowly("bert", "context"), slowly("moe", "expert")])
def test_split_models_are_within_the_tolerance_in_float32_and_in_float64(kind, family, agent):
    for wide, tolerance in ((False, 1e-5), (True, 1e-10)):
        verdict = proved(kind, family, agent, wide=wide)
        assert 0 < verdict["error"] < verdict["tolerance"] == tolerance
        assert verdict["worst"]


@pytest.mark.parametrize(
    ("kind", "family"),
    [("lstm", "pipe"), slowly("resnet", "states"), slowly("bert", "memory"), slowly("elmo", "servers")],
)
def test_exact_plans_are_bit_equal(kind, family, agent):
    verdict = proved(kind, family, agent)
    assert (verdict["error"], verdict["tolerance"]) == (0.0, 0.0)


@pytest.mark.soak
def test_the_whole_list_agrees_over_twenty_steps():
    found = prove_standard(steps=20)
    assert found["differences"] == []
    assert len(found["plans"]) >= 40


def test_a_recipe_of_ones_own_is_proved_under_the_plans_that_it_can_be_split_by(agent):
    recipe, data = RECIPES["mlp"], data_of("mlp", SAMPLES)
    plans, others = fitting(recipe, ["tensor", "pipe", "context", "expert"], data=data)
    axes = {axis for plan in plans for axis in families(plan)}
    assert axes >= {"pipe", "tensor"}
    assert not axes & {"context", "expert"}
    assert "experts" in dict(others)["expert=2"]
    chosen = [plan for plan in plans if label(plan) in ("tensor=2", "pipe=2")]
    found = prove(recipe, steps=2, plans=chosen, data=data, agent=agent)
    assert [p["ok"] for p in found["plans"]] == [True, True]
    with pytest.raises(UserError, match="no plan of expert fits this recipe"):
        fitting(recipe, ["expert"], data=data)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(mesh={"expert": 2}), "has no experts"),
        (Plan(mesh={"data": 6}), "6 workers for 5 shards"),
        (Plan(mesh={"context": 2}), "cannot split its sequences"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_runs(plan, says):
    with pytest.raises(UserError, match=says):
        prove(replace(RECIPES["mlp"], steps=2), plans=[plan], data=data_of("mlp"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plans", "standart"], "did you mean 'standard'"),
        (["--plans", "tensor", "--models", "gtp"], "did you mean 'gpt'"),
        (["--plans", "expert", "--models", "mlp"], "no plan of expert for mlp"),
        (["--plans", "standard", "--shards", "4"], "leave --shards out"),
        (["--plans", "standard,mine.toml"], "not both"),
        (["--plans", "mine.toml"], "mine.toml"),
        (["--models", "gpt"], "--plans standard"),
        (["gpt-stdlib", "--plans", "pipes"], "did you mean 'pipe'"),
    ],
)
def test_the_command_says_what_it_does_not_know(arguments, says, capfd):
    assert main(["prove", *arguments]) == 2
    said = capfd.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_the_command_lists_every_plan_with_its_largest_error(launches_here, capfd):
    assert main(["prove", "--plans", "fast", "--models", "mlp", "--steps", "2", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert [(p["model"], p["plan"], p["ok"]) for p in found["plans"]] == [
        ("mlp", "data=4 fast", True),
        ("mlp float64", "data=4 fast", True),
    ]
    assert all(isinstance(p["error"], float) for p in found["plans"])
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["proved", "proved"]
