"""Typed dataclasses to and from TOML."""

import tomllib
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import DataSpec, ModelSpec, OptimizerSpec, Recipe, Reporting, ScheduleSpec
from shoal.recipe.typed import (
    convert_key,
    dotted_keys,
    flatten,
    from_mapping,
    hint_of,
    read_toml,
    to_mapping,
    to_toml,
    unflatten,
)

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
names = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
numbers = st.floats(min_value=1e-8, max_value=10, allow_nan=False)
scalars = words | st.booleans() | st.integers(-9, 9) | numbers


def options(cls: type) -> st.SearchStrategy[dict[str, object]]:
    taken = {key.split(".")[0] for key in dotted_keys(cls)} | {"options"}
    return st.dictionaries(names.filter(lambda name: name not in taken), scalars, max_size=3)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    shards, micro = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    steps = draw(st.integers(0, 99))
    return Recipe(
        model=ModelSpec(
            kind=draw(words), freeze=tuple(draw(st.lists(words, max_size=2))), options=draw(options(ModelSpec))
        ),
        data=DataSpec(path=draw(words), validation=draw(st.floats(0, 0.9)), options=draw(options(DataSpec))),
        optimizer=OptimizerSpec(lr=draw(numbers), options=draw(options(OptimizerSpec))),
        schedule=ScheduleSpec(kind=draw(st.sampled_from(["constant", "cosine", "linear", "step"]))),
        report=Reporting(tensorboard=draw(st.booleans())),
        batch=shards * micro * draw(st.integers(1, 9)),
        shards=shards,
        micro_batches=micro,
        steps=steps,
        epochs=0 if steps else draw(st.integers(1, 9)),
        clip=draw(st.floats(0, 9)),
    )


@given(recipes())
def test_a_recipe_that_is_written_as_toml_reads_back_equal(recipe):
    back = from_mapping(Recipe, tomllib.loads(to_toml(recipe)))
    assert back == recipe
    assert back.arithmetic_hash == recipe.arithmetic_hash


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 9))
def test_a_plan_that_is_written_as_toml_reads_back_equal(placement, prefetch):
    plan = Plan(mesh={"data": len(placement)}, placement=tuple(placement), prefetch=prefetch)
    assert from_mapping(Plan, tomllib.loads(to_toml(plan))) == plan


@given(recipes())
def test_unflatten_is_the_inverse_of_flatten(recipe):
    flat = flatten(to_mapping(recipe))
    assert flatten(unflatten(flat)) == flat
    assert from_mapping(Recipe, unflatten(flat)) == recipe


def test_a_key_cannot_be_both_a_value_and_a_table():
    with pytest.raises(UserError, match=r"'a' is a value, not a table"):
        unflatten({"a": 1, "a.b": 2})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"stesp": 5}, "unknown key 'stesp' in x.toml: did you mean 'steps'?"),
        ({"schedule": {"warm": 5}}, "did you mean 'schedule.warmup_steps'?"),
        ({"steps": "5"}, "'steps' in x.toml must be a whole number, got '5'."),
        ({"steps": True}, "'steps' in x.toml must be a whole number, got True."),
        ({"steps": 5, "clip": "a"}, "'clip' in x.toml must be a number, got 'a'."),
        ({"steps": 5, "model": 5}, "'model' in x.toml must be a table, got 5."),
        ({"model": {"freeze": [1]}}, "'model.freeze[0]' in x.toml must be text, got 1."),
        ({"precision": "bf16"}, "unknown value for precision 'bf16' in x.toml: did you mean 'bfloat16'?"),
        (
            {"model": {"options": {"layers": 2}}},
            "'model.options' in x.toml is not a table: write its keys under 'model'.",
        ),
    ],
)
def test_a_mistake_is_told_with_its_place_and_the_nearest_name(mapping, message):
    with pytest.raises(UserError) as caught:
        from_mapping(Recipe, mapping, "x.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_that_a_table_does_not_name_are_kept_for_the_kind_that_knows_them():
    recipe = from_mapping(Recipe, {"steps": 1, "model": {"kind": "gpt", "layers": 3}})
    assert recipe.model.options == {"layers": 3}
    assert to_mapping(recipe)["model"]["layers"] == 3


@dataclass(frozen=True)
class Wide:
    pair: tuple[int, str] = (1, "a")
    maybe: int | None = None
    table: dict[str, float] = field(default_factory=dict)


def test_pairs_unions_and_tables_are_typed():
    assert from_mapping(Wide, {"pair": [2, "b"], "maybe": 3, "table": {"x": 1}}) == Wide((2, "b"), 3, {"x": 1.0})
    assert "maybe" not in to_mapping(Wide())
    for wrong in ({"pair": [2]}, {"maybe": "x"}, {"table": {"x": "y"}}):
        with pytest.raises(UserError):
            from_mapping(Wide, wrong)


def test_a_dotted_key_is_typed_as_its_field_is():
    assert hint_of(Recipe, "optimizer.lr") is float
    assert hint_of(Plan, "mesh.data") is int
    assert convert_key(Recipe, "optimizer.lr", 1) == 1.0
    assert convert_key(Recipe, "model.layers", [1]) == [1]
    with pytest.raises(UserError, match=r"unknown key 'lr' in --set: did you mean 'optimizer.lr'"):
        hint_of(Recipe, "lr", "--set")
    with pytest.raises(UserError, match="'steps' is a value, not a table"):
        hint_of(Recipe, "steps.x")


def test_a_file_that_is_missing_torn_or_not_text_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no file '.*gone\.toml': check the path"):
        read_toml(tmp_path / "gone.toml")
    (tmp_path / "torn.toml").write_text("steps = 1\nclip = = 2")
    with pytest.raises(UserError, match=r"torn\.toml' is not valid TOML: .*line 2"):
        read_toml(tmp_path / "torn.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        read_toml(tmp_path / "bytes.toml")
    with pytest.raises(UserError, match="cannot read"):
        read_toml(tmp_path)
