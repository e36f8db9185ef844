"""The prover says "same" where every bit is, and finds what was planted where it was planted."""

import json
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from plain_loop import train as plain
from planted_faults import STEP, Crash, Doubled, Factory, Forgotten, Skipped, Touched, Twice
from prove_subjects import RECIPES, OneLayer, SometimesUsed, data_of, halves

from shoal.cli.main import main
from shoal.errors import UserError
from shoal.prove.api import prove
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import ModelSpec, OptimizerSpec, Recipe

STEPS = 4
FIRST, LAST = "gradient/layers.0.weight", "gradient/layers.1.bias"


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    """An empty working directory and an empty temporary one, and no launcher around us."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def found(agent):
    """``found(fault, *plans)``: the verdicts on a tiny model when its factory plants the fault."""

    def prove_with(fault, *plans, steps=STEPS):
        recipe, data = RECIPES["mlp"], data_of("mlp")
        model = Factory(fault, recipe.model, data.train.facts)
        return prove(recipe, steps=steps, plans=plans, data=data, model=model, agent=agent)["plans"]

    return prove_with


def at(step, tensor):
    return {"step": step, "layer": tensor.split("/")[1].rpartition(".")[0], "tensor": tensor}


def plan(workers, **given):
    return Plan(mesh={"data": workers}, **given)


@pytest.mark.parametrize("name", ["gpt", "lstm", "cnn"])
def test_the_same_bits_on_1_2_and_3_workers_as_in_a_plain_loop(name, agent):
    recipe = RECIPES[name]
    result = prove(recipe, workers=(1, 2, 3), steps=STEPS, data=data_of(name), agent=agent)
    names = ["data=1", "data=2", "data=3", "data=2 placement=1+4", "data=3 placement=1+3+1", "data=3 fast"]
    assert [(p["plan"], p["ok"], p["differs"]) for p in result["plans"]] == [(n, True, None) for n in names]
    exact = [p for p in result["plans"] if "fast" not in p["plan"]]
    assert {p["error"] for p in exact} == {0.0}
    expected = plain(recipe, data_of(name), STEPS)
    assert {p["weights_sha256"] for p in exact} == {result["reference"]["weights_sha256"]} == {expected}
    fast = result["plans"][-1]
    assert fast["error"] <= fast["tolerance"] == result["tolerance"]["fast"]


def test_a_gradient_that_one_worker_doubles_is_named_with_its_step_and_only_where_that_worker_is(found):
    alone, two, fast = found(Doubled(), plan(1), plan(2), plan(2, sync="fast"))
    assert alone["ok"]
    for verdict in (two, fast):
        assert not verdict["ok"]
        assert verdict["differs"] == at(STEP, LAST)
        assert verdict["ranks"] == [0, 1]
        assert verdict["shards"] == []  # no loss is another one: the sum is wrong
        assert verdict["error"] > 1e-5


def test_synchronous_parameter_servers_have_the_bits_of_the_plain_loop_and_a_skipped_sample_shows(found, agent):
    served = plan(2, sync="parameter-server", servers=2)
    recipe = RECIPES["mlp"]
    [sound] = prove(recipe, steps=STEPS, plans=[served], data=data_of("mlp"), agent=agent)["plans"]
    assert (sound["ok"], sound["differs"], sound["error"]) == (True, None, 0.0)
    [skipped] = found(Skipped(None), served)
    assert not skipped["ok"]
    assert skipped["differs"] == at(STEP, FIRST.replace("gradient", "model"))
    assert skipped["shards"] == [4]


@pytest.mark.parametrize("apart", [{"sync": "local"}, {"sync": "parameter-server", "staleness": 2}])
def test_a_plan_whose_workers_share_no_step_is_refused(apart):
    with pytest.raises(UserError, match="proofs compare steps that all workers share"):
        prove(RECIPES["mlp"], data=data_of("mlp"), plans=[plan(2, **apart)])


def test_a_forgotten_addition_is_found_at_the_first_step(found):
    alone, two = found(Forgotten(), plan(1), plan(2), steps=1)
    assert alone["ok"]
    assert two["differs"] == at(1, FIRST)
    assert two["shards"] == []
    assert two["looks_like"] == "the gradient of shard 4 is missing from the sum"


@pytest.mark.parametrize("instead", [None, 0])
def test_a_skipped_or_exchanged_sample_is_named_with_its_step_and_shard(instead, found):
    alone, two, fast = found(Skipped(instead), plan(1), plan(2, placement=(2, 3)), plan(2, sync="fast"))
    assert alone["ok"]
    for verdict in (two, fast):
        assert not verdict["ok"]
        assert verdict["differs"] == at(STEP, FIRST)
        assert verdict["shards"] == [4]


def test_workers_that_part_from_one_another_are_told_in_every_mode(found):
    exact, fast = found(Twice(), plan(2), plan(2, sync="fast"))
    for verdict in (exact, fast):
        assert verdict["differs"] == at(STEP, "model/layers.0.weight")
        assert verdict["ranks"] == [1]


def test_a_weight_that_changes_after_the_last_step_is_told_too(found):
    [verdict] = found(Touched(), plan(2), steps=2)
    assert not verdict["ok"]
    assert verdict["differs"] == at(2, "model/layers.0.bias")
    assert verdict["ranks"] == [1]


def test_a_run_that_fails_is_one_verdict_among_the_others(found):
    broken, whole = found(Crash(), plan(2), plan(1))
    assert (broken["ok"], broken["differs"], broken["error"]) == (False, None, float("inf"))
    assert "rank 1" in broken["failure"]
    assert "ArithmeticError: planted" in broken["failure"]
    assert whole["ok"]


def test_a_plan_that_the_workers_find_impossible_is_one_verdict_among_the_others(agent):
    recipe = replace(RECIPES["mlp"], model=ModelSpec(kind="custom", task="classification"))
    found = prove(recipe, steps=1, plans=[Plan(mesh={"pipe": 3}), plan(1)], model=OneLayer, data=halves(), agent=agent)
    assert [verdict["ok"] for verdict in found["plans"]] == [False, True]
    assert "chunks" in found["plans"][0]["failure"]
    assert found["differences"] == [f"pipe=3: {found['plans'][0]['failure']}"]


@pytest.fixture
def recipe_file(tmp_path):
    draw = np.random.default_rng(0)
    samples = draw.normal(size=(40, 3)).astype("f4")
    np.savez(tmp_path / "samples.npz", input=samples, target=draw.integers(0, 3, 40))

    def write(model):
        file = tmp_path / "recipe.toml"
        file.write_text(
            f'batch = 8\nshards = 4\nsteps = 100\nprecision = "float32"\n'
            f'[data]\nsource = "arrays"\npath = "{tmp_path}/samples.npz"\nvalidation = 0.2\n[model]\n{model}\n'
        )
        return str(file)

    return write


def test_the_command_proves_a_recipe_file_and_leaves_nothing_behind(recipe_file, launches_here, capfd, tmp_path):
    file = recipe_file('kind = "mlp"\nhidden = [4]')
    assert main(["prove", file, "--workers", "1,2", "--steps", "3", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [(p["plan"], p["ok"], p["differs"]) for p in result["plans"]] == [
        (name, True, None) for name in ("data=1", "data=2", "data=2 placement=1+3", "data=2 fast")
    ]
    assert all(isinstance(p["error"], float) for p in result["plans"])
    assert (result["steps"], result["precision"]) == (3, "float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.toml", "samples.npz", "temporary"]
    assert not list((tmp_path / "temporary").iterdir())


def test_the_command_takes_plan_files(recipe_file, launches_here, capfd, tmp_path):
    file = recipe_file('kind = "mlp"\nhidden = [4]')
    (tmp_path / "mine.toml").write_text("[mesh]\ntensor = 2\n")
    assert main(["prove", file, "--plans", str(tmp_path / "mine.toml"), "--steps", "2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [(p["plan"], p["ok"], p["tolerance"]) for p in result["plans"]] == [("tensor=2", True, 1e-5)]


def test_the_command_exits_1_and_names_what_a_planted_fault_changed(recipe_file, launches_here, capfd):
    file = recipe_file('kind = "custom"\ntask = "classification"\nfactory = "planted_faults:doubled_mlp"\nhidden = 4')
    assert main(["prove", file, "--workers", "1,2", "--steps", "4"]) == 1
    rows = capfd.readouterr().out.splitlines()
    assert [row.split()[1] for row in rows if row.startswith("data=1 ")] == ["same"]
    assert any(
        "DIFFERS" in row and f"step {STEP}, layer layers.1, {LAST}" in row for row in rows if row.startswith("data=2 ")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "at least 1 step"),
        ({"workers": (6,)}, "6 workers for 5 shards"),
        ({"plans": [plan(1, device="cuda")]}, "on the CPU"),
    ],
)
def test_what_cannot_be_proved_is_refused_before_anything_runs(given, message):
    with pytest.raises(UserError, match=message):
        prove(RECIPES["mlp"], data=data_of("mlp"), **given)


def test_a_parameter_that_a_shard_does_not_use_adds_zero_and_not_nothing(agent):
    """-0.0 + 0.0 is 0.0: leaving the addition out would keep a -0.0 on some placements only."""
    recipe = Recipe(
        model=ModelSpec(kind="custom", task="classification", factory="a:b"),
        optimizer=OptimizerSpec(name="sgd", lr=0.1),
        batch=4,
        shards=4,
        steps=20,
        precision="float32",
    )
    plans = [Plan(mesh={"data": workers}) for workers in (1, 2, 3, 4)]
    found = prove(recipe, steps=20, model=SometimesUsed, data=halves(), plans=plans, agent=agent)
    assert [verdict["differs"] for verdict in found["plans"]] == [None] * 4
