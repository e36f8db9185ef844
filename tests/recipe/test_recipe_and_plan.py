"""What a Recipe and a Plan refuse, and how shards are placed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.recipe.axes import Axes
from shoal.recipe.pipeline_plan import PipelinePlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import DataSpec, OptimizerSpec, Recipe, Reporting


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 30}, "batch 30 is not divisible by 8 shards x 1 micro-batches: try batch = 32"),
        ({"batch": 3}, "try batch = 8"),
        ({"shards": 0}, "shards must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"seed": 1 << 63}, "seed must be less than 2\\*\\*63"),
        ({"clip": -1.0}, "clip must be a number from 0 on, got -1.0"),
        ({"optimizer": OptimizerSpec(lr=float("nan"))}, "optimizer.lr must be a number from 0 on, got nan"),
        ({"optimizer": OptimizerSpec(lr=float("inf"))}, "optimizer.lr must be a number from 0 on, got inf"),
        ({"epochs": 1}, r"give steps \(1\) or epochs \(1\), not both"),
        ({"steps": 0}, "the length is missing: set steps or epochs"),
        ({"data": DataSpec(validation=0.6, test=0.4)}, "less than 1"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        Recipe(**{"steps": 1, **values})


def test_the_hash_names_the_arithmetic_and_nothing_else():
    recipe = Recipe(steps=1)
    same = replace(recipe, data=DataSpec(path="elsewhere"), report=Reporting(keep=9))
    assert same.arithmetic_hash == recipe.arithmetic_hash
    for other in (
        replace(recipe, seed=1),
        replace(recipe, shards=4),
        replace(recipe, optimizer=OptimizerSpec(options={"betas": [0.9, 0.95]})),
    ):
        assert other.arithmetic_hash != recipe.arithmetic_hash


@given(st.integers(1, 12), st.integers(1, 40))
def test_shards_are_spread_evenly_in_order_and_each_has_one_owner(workers, shards):
    plan = Plan(mesh={"data": workers})
    if workers > shards:
        with pytest.raises(UserError, match=f"Use at most {shards} workers"):
            plan.owned(shards)
        return
    owned = plan.owned(shards)
    assert [shard for run in owned for shard in run] == list(range(shards))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_a_placement_is_kept_or_refused():
    assert Plan(mesh={"data": 2}, placement=(5, 3)).owned(8) == (range(0, 5), range(5, 8))
    with pytest.raises(UserError, match="places 8 shards, the recipe has 4"):
        Plan(mesh={"data": 2}, placement=(5, 3)).owned(4)
    with pytest.raises(UserError, match="at least one shard"):
        Plan(mesh={"data": 3}, placement=(5, 3))
    with pytest.raises(UserError, match="at least one shard"):
        Plan(mesh={"data": 2}, placement=(8, 0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mesh": {"data": 0}}, "mesh axis 'data' must have at least 1 worker, got 0"),
        ({"mesh": {"tensr": 2}}, "unknown axis 'tensr' in plan.mesh: did you mean 'tensor'?"),
        ({"mesh": {}}, "the mesh has no axis"),
        ({"rules": {"heads": "tenso"}}, "unknown axis 'tenso' in plan.rules.heads: did you mean 'tensor'?"),
        ({"mesh": {"pipe": 2}, "sync": "local"}, "is for whole models, and the mesh splits this one .pipe = 2."),
        ({"mesh": {"data": 4}, "states": "zero1", "state_group": 3}, "state_group = 3 must divide the 4 data replicas"),
        ({"states": "zero3", "sync": "fast"}, "states = 'zero3' needs sync = 'exact'"),
        ({"pipeline": PipelinePlan(chunks=2)}, "pipeline.chunks = 2 is for a mesh with an axis 'pipe'"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        Plan(**given)


@given(st.permutations(["data", "pipe", "tensor"]), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_ranks_are_row_major_over_the_axes_and_every_partition_has_each_rank_once(names, sizes):
    axes = Axes.of(dict(zip(names, sizes, strict=True)))
    for rank in range(axes.world):
        assert axes.rank(axes.coordinates(rank)) == rank
        assert rank in axes.along(rank, "pipe")
        assert len(axes.along(rank, "pipe", "data")) == axes.size("pipe") * axes.size("data")
    for group in (("pipe",), ("data", "tensor"), ()):
        assert sorted(rank for part in axes.partition(*group) for rank in part) == list(range(axes.world))
    assert axes.along(0, names[2]) == tuple(range(sizes[2]))


def test_recipes_and_plans_load_from_files(tmp_path):
    file = tmp_path / "recipe.toml"
    recipe = Recipe(steps=3)
    file.write_text(recipe.to_toml())
    assert Recipe.from_toml(file) == recipe
    file.write_text(Plan(sync="fast").to_toml())
    assert Plan.from_toml(str(file)) == Plan(sync="fast")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"servers": 2}, "servers = 2 is for sync = 'parameter-server'"),
        ({"staleness": 3}, "staleness = 3 is for sync = 'parameter-server'"),
        ({"average_every": 4}, "average_every = 4 is for sync = 'local'"),
        ({"staleness": -2, "sync": "parameter-server"}, "staleness -2 is none"),
        ({"servers": 0, "sync": "parameter-server"}, "servers must be at least 1"),
    ],
)
def test_a_key_that_the_way_to_synchronise_does_not_have_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        Plan(**given)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"sync": "local", "average_every": 4}, "for 4 steps"),
        ({"sync": "parameter-server", "staleness": 3}, "up to 3 steps old"),
        ({"sync": "parameter-server", "staleness": -1}, "any number of steps old"),
        ({"compression": "int8"}, "int8"),
    ],
)
def test_a_lossy_plan_says_which_part_is(given, part):
    assert part in Plan(**given).lossy


def test_a_plan_that_keeps_all_bits_is_not_lossy():
    assert not any(Plan(sync=sync).lossy for sync in ("exact", "fast", "parameter-server"))
