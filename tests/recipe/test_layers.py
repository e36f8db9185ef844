"""Effective values and their origins: defaults < preset < recipe file < flags."""

from dataclasses import fields

import pytest

from shoal.errors import UserError
from shoal.recipe import presets
from shoal.recipe.layers import assemble, assemble_plan, owner, parse_setting, saved_layer
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.recipe.typed import flatten, to_mapping


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("steps = 7\n[model]\nkind = 'gpt'\nlayers = 3\n[data]\npath = 'x.txt'\n")
    return path


def test_each_layer_wins_over_those_below_it_and_is_named(file):
    recipe, origins = assemble(file, "gpt-stdlib", {"model.layers": 9, "seed": 4}, spelt={"seed": "--seed"})
    assert (recipe.steps, recipe.model.options["layers"], recipe.batch, recipe.seed) == (7, 9, 32, 4)
    assert origins["steps"] == origins["data.path"] == f"file {file}"
    assert origins["model.layers"] == "flag --set"
    assert origins["seed"] == "flag --seed"
    assert origins["batch"] == origins["model.width"] == "preset gpt-stdlib"
    assert origins["threads"] == "default"


def test_a_file_alone_stands_over_the_defaults(file):
    recipe, origins = assemble(file)
    assert recipe.model.options == {"layers": 3}
    assert recipe.batch == Recipe(steps=1).batch
    assert origins["batch"] == "default"


def test_every_effective_value_has_an_origin(file):
    recipe, origins = assemble(file)
    plan, plan_origins = assemble_plan(shards=8, cores=2)
    assert set(origins) == set(flatten(to_mapping(recipe)))
    assert set(plan_origins) == set(flatten(to_mapping(plan)))


def test_recipe_and_plan_share_no_key():
    assert not {f.name for f in fields(Recipe)} & {f.name for f in fields(Plan)}
    assert owner("model.layers", "") is Recipe
    assert owner("mesh.data", "") is Plan
    with pytest.raises(UserError, match="unknown key 'prefetsch' in --set: did you mean 'prefetch'"):
        owner("prefetsch", "--set")


def test_a_length_in_a_higher_layer_unsets_the_other_length_below(file):
    recipe, origins = assemble(file, None, {"epochs": 2})
    assert (recipe.steps, recipe.epochs) == (0, 2)
    assert origins["steps"] == "default"
    recipe, _ = assemble(None, "mnist-cnn", {"steps": 5})
    assert (recipe.steps, recipe.epochs) == (5, 0)
    with pytest.raises(UserError, match="not both"):
        assemble(file, None, {"epochs": 2, "steps": 3})
    with pytest.raises(UserError, match="length is missing"):
        assemble(file, None, {"steps": 0})


def test_another_kind_takes_away_the_options_of_the_old_one():
    recipe, _ = assemble(None, "gpt-stdlib", {"model.kind": "mlp", "model.hidden": 8, "optimizer.name": "sgd"})
    assert recipe.model.options == {"hidden": 8}
    assert recipe.optimizer.lr == presets.load("gpt-stdlib")["optimizer"]["lr"]
    kept, _ = assemble(None, "gpt-stdlib", {"model.kind": "gpt", "model.hidden": 8})
    assert set(kept.model.options) > {"hidden", "layers"}


def test_a_mistake_names_the_layer_that_it_stands_in(file):
    with pytest.raises(UserError, match=r"'steps' in flag --steps must be a whole number, got 'x'"):
        assemble(file, None, {"steps": "x"}, spelt={"steps": "--steps"})
    file.write_text("steps = 7\nmodle = 3\n")
    with pytest.raises(UserError, match=r"unknown key 'modle' in file .*r\.toml"):
        assemble(file)
    with pytest.raises(UserError, match="unknown preset 'gpt': did you mean 'gpt-"):
        assemble(None, "gpt")


def test_a_saved_recipe_keeps_the_origins_that_its_run_wrote_down(file):
    first, origins = assemble(file)
    again, kept = assemble(flags={"seed": 3}, spelt={"seed": "--seed"}, saved=saved_layer(first, origins))
    assert again.model == first.model
    assert kept == {**origins, "seed": "flag --seed"}


def test_workers_that_nobody_asked_for_are_one_a_core_and_at_most_one_a_shard():
    for shards, cores, workers in ((8, 2, 2), (3, 16, 3), (4, 0, 1)):
        plan, origins = assemble_plan(shards=shards, cores=cores)
        assert plan.workers == workers
        assert origins["mesh.data"] == "detected"


def test_under_torchrun_the_workers_are_those_that_it_started():
    plan, origins = assemble_plan(shards=8, cores=2, world_size=4)
    assert (plan.workers, origins["mesh.data"]) == (4, "torchrun")
    with pytest.raises(UserError, match=r"2 workers \(flag --workers\), but torchrun started 4"):
        assemble_plan(None, {"mesh.data": 2}, shards=8, cores=2, world_size=4, spelt={"mesh.data": "--workers"})


def test_a_placement_says_how_many_workers_there_are():
    plan, origins = assemble_plan(None, {"placement": [5, 3]}, shards=8, cores=1, spelt={"placement": "--placement"})
    assert (plan.workers, plan.placement) == (2, (5, 3))
    assert origins["mesh.data"] == "flag --placement"


def test_a_number_of_workers_unsets_a_placement_below_it(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text("placement = [5, 3]\nprefetch = 7\n[mesh]\ndata = 2\n")
    plan, origins = assemble_plan(file, {"mesh.data": 4}, shards=8, cores=1)
    assert (plan.workers, plan.placement, plan.prefetch) == (4, (), 7)
    assert origins["prefetch"] == f"file {file}"
    plan, _ = assemble_plan(file, {"placement": (1, 1, 6)}, shards=8, cores=1)
    assert plan.workers == 3


def test_a_recipe_in_the_place_of_a_plan_and_the_other_way_round_is_told_so(tmp_path):
    recipe, plan = tmp_path / "recipe.toml", tmp_path / "plan.toml"
    recipe.write_text("batch = 16\nsteps = 2\n")
    plan.write_text("[mesh]\ndata = 2\n")
    with pytest.raises(UserError, match=r"'batch' in file .*recipe\.toml belongs to a recipe, not to a plan"):
        assemble_plan(recipe, shards=8, cores=1)
    with pytest.raises(UserError, match=r"'mesh\.data' in file .*plan\.toml belongs to a plan, not to a recipe"):
        assemble(plan)


def test_rules_for_single_modules_have_names_with_dots(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(
        'mesh = { tensor = 2 }\n[rules]\n"up.ffn" = "tensor"\n[dimensions]\n"a.*.weight" = ["ffn", "width"]\n'
    )
    plan, origins = assemble_plan(file, dict([parse_setting("rules.down.width=tensor")]), shards=8, cores=1)
    assert plan.rules == {"up.ffn": "tensor", "down.width": "tensor"}
    assert plan.dimensions == {"a.*.weight": ("ffn", "width")}
    assert origins["rules.down.width"] == "flag --set"


def test_more_workers_than_shards_is_refused_before_anything_starts():
    with pytest.raises(UserError, match="9 workers for 8 shards"):
        assemble_plan(None, {"mesh.data": 9}, shards=8, cores=1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model.layers=6", 6),
        ("model.dropout = 0.5", 0.5),
        ("model.kind=mlp", "mlp"),
        ("model.kind='mlp'", "mlp"),
        ("report.tensorboard=true", True),
        ("model.freeze=['a', 'b']", ["a", "b"]),
        ("model.freeze=['a'", "['a'"),
        ("model.freeze=a", ["a"]),
        ("model.freeze=a, b.0", ["a", "b.0"]),
        ("data.path=2024", "2024"),
        ("data.path=/a=b", "/a=b"),
        ("data.path=1\nx=2", "1\nx=2"),
        ("data.path=", ""),
    ],
)
def test_a_setting_is_toml_and_a_bare_word_is_text(text, value):
    assert parse_setting(text) == (text.split("=")[0].strip(), value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers", "write it as key=value"),
        ("=6", "write it as key=value"),
        ("lr=1", "did you mean 'optimizer.lr'"),
        ("modl.layers=1", "unknown key 'modl.layers' in --set"),
        ("schedule.warmup=1", "did you mean 'schedule.warmup_steps'"),
        ("layers=3", "did you mean 'model.layers'"),
        ("memory.budget=1GiB", "known in memory: .*peak_bytes"),
        ("memory.peak=1GiB", "did you mean 'memory.peak_bytes'"),
    ],
)
def test_a_setting_that_says_nothing_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_setting(text)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_makes_a_recipe_of_eight_shards(name):
    recipe, origins = assemble(None, name)
    assert recipe.shards == 8
    assert f"preset {name}" in origins.values()
