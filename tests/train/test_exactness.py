"""The same bits on any number of workers, and those of a plain loop."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train import plain_loop, tiny_runs
from train.tiny_runs import recipe, splits

from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run
from shoal.train.api import train
from shoal.train.weights import weights_sha256

KINDS = ("cnn", "lstm", "gpt", "resnet")
WORKERS = (2, 3, 4, 5, 8)
OFTEN = {("gpt", "float32", 2), ("cnn", "bfloat16", 1)}  # the whole matrix of these in every run of the tests
TAILS = {"shorter than the shards": 101, "longer than the shards": 107, "none": 96}  # with a batch of 16


def plan(*placement: int, **changes: object) -> Plan:
    return Plan(mesh={"data": len(placement)}, placement=placement, device="cpu", **changes)


def trail(result: dict) -> list[tuple]:
    """All that the log says of the arithmetic, step by step."""
    events = Run(Path(result["run_dir"])).events()
    keys = ("step", "epoch", "index", "loss", "grad_norm", "lr", "samples", "targets")
    return [tuple(event[key] for key in keys) for event in events if event["event"] == "committed"]


@pytest.fixture(scope="module")
def alone(agent, tmp_path_factory):
    """``alone(recipe, samples)``: a run on one worker, made once for all that compare with it."""
    known = {}

    def train_alone(wanted: Recipe, samples: int) -> dict:
        key = (wanted.to_toml(), samples)
        if key not in known:
            data, folder = splits(wanted.model.kind, samples), tmp_path_factory.mktemp("alone") / "run"
            known[key] = train(wanted, Plan(device="cpu"), agent=agent, run_dir=folder, data=data)
        return known[key]

    return train_alone


def agrees(run, wanted: Recipe, data, plans, clips: bool = False):
    """Run under every plan; all must leave the same weights and the same trail."""
    first = run(wanted, 1, data=data)
    assert first["steps"] == wanted.steps >= 9
    if clips:
        norms = [step[4] for step in trail(first)]
        assert sum(norm > wanted.clip for norm in norms) >= 5, "the recipe must clip, or this proves nothing"
    for other in plans:
        result = run(wanted, plan=other, data=data)
        assert result["weights_sha256"] == first["weights_sha256"], other
        assert trail(result) == trail(first), other
        assert result["figures"] == first["figures"], other
    return first


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_do_not_depend_on_the_number_of_workers(run, kind, precision):
    wanted = recipe(kind, precision=precision, clip=0.05)
    agrees(run, wanted, splits(kind, 101), [plan(3, 5), plan(3, 3, 2)], clips=True)


@pytest.mark.parametrize(
    ("kind", "precision", "micro_batches", "tail"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[:3] in OFTEN else pytest.mark.soak)
        for kind in KINDS
        for precision in ("float32", "bfloat16")
        for case in (
            (kind, precision, 1, "shorter than the shards"),
            (kind, precision, 2, "longer than the shards"),
        )
    ],
)
def test_the_whole_matrix_gives_one_hash_a_recipe(run, kind, precision, micro_batches, tail):
    wanted = recipe(kind, precision=precision, micro_batches=micro_batches, clip=0.05)
    even = [Plan(mesh={"data": n}, device="cpu") for n in WORKERS]
    uneven = [plan(1, 7), plan(5, 1, 2), plan(2, 1, 1, 1, 3), plan(4, 4, bucket_bytes=1)]
    agrees(run, wanted, splits(kind, TAILS[tail]), [*even, *uneven], clips=True)


@pytest.mark.parametrize("samples", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_tail_of_an_epoch_may_be_of_any_length(run, micro_batches, samples):
    agrees(run, recipe("mlp", micro_batches=micro_batches), splits("mlp", samples), [plan(1, 7), plan(4, 1, 3)])


@pytest.mark.parametrize("samples", [1, 3, 16])
def test_a_data_set_smaller_than_the_batch_or_as_large_is_trained_on(run, samples):
    agrees(run, recipe("mlp"), splits("mlp", samples), [plan(4, 4), plan(2, 1, 5)])


@pytest.mark.parametrize("shards", [1, 3, 5, 8])
def test_any_number_of_shards_is_summed_in_its_own_tree(run, shards):
    wanted = recipe("mlp", shards=shards, batch=shards * 4)
    even = [Plan(mesh={"data": n}, device="cpu") for n in (2, 3, 5) if n <= shards]
    agrees(run, wanted, splits("mlp", 50), even)


def test_the_size_of_buckets_and_the_loading_do_not_matter(run):
    wanted = recipe("mlp", model=replace(tiny_runs.model("mlp"), options={"hidden": (700, 300)}), clip=0.1)
    plans = [plan(3, 5, bucket_bytes=1), plan(3, 5, bucket_bytes=300_000), plan(3, 5, prefetch=0), plan(8, loaders=3)]
    agrees(run, wanted, splits("mlp", 101), plans, clips=True)


# --- stopped and resumed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_a_run_resumed_in_mid_epoch_on_other_workers_ends_with_the_bits_of_an_uninterrupted_one(
    run, alone, kind, before, after
):
    data = splits(kind, 53)  # four steps an epoch
    wanted = recipe(kind, clip=0.05)
    whole = alone(wanted, 53)
    part = run(replace(wanted, steps=6), before, data=data)
    assert trail(part)[-1][1:3] == (1, 1), "the cut must lie inside of an epoch"
    rest = run(wanted, after, data=data, resume=part["run_dir"])
    assert rest["weights_sha256"] == whole["weights_sha256"]
    assert trail(rest) == trail(whole)
    assert (rest["samples"], rest["steps"]) == (whole["samples"], whole["steps"])


# --- against a plain loop -----------------------------------------------------------------------------------------


def adamw(model):
    return torch.optim.AdamW(plain_loop.decayed(model), lr=0.01, fused=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("precision", "micro_batches"),
    [
        ("float32", 2),
        ("bfloat16", 1),
        pytest.param("float32", 1, marks=pytest.mark.soak),
        pytest.param("bfloat16", 2, marks=pytest.mark.soak),
    ],
)
def test_a_plain_loop_written_from_the_contract_gives_the_same_bits(run, kind, precision, micro_batches):
    data = splits(kind, 107)
    wanted = recipe(kind, precision=precision, micro_batches=micro_batches, clip=0.05)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        state, losses, norms = plain_loop.plain_training(wanted, data.train, adamw)
    finally:
        torch.set_num_threads(before)
    result = run(wanted, 2, data=data)
    told = trail(result)
    assert [step[3] for step in told] == losses
    assert [step[4] for step in told] == norms
    assert sum(norm > wanted.clip for norm in norms) >= 5
    assert result["weights_sha256"] == weights_sha256(state)


# --- the fast mode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cnn", "gpt"])
@pytest.mark.parametrize("placement", [(8,), (3, 5), (3, 3, 2)])
def test_the_fast_mode_stays_within_rounding_of_the_exact_one(run, alone, kind, placement):
    wanted = recipe(kind, clip=0.05, optimizer=tiny_runs.OptimizerSpec(name="sgd", lr=0.05))
    exact = alone(wanted, 101)
    fast = run(wanted, plan=plan(*placement, sync="fast"), data=splits(kind, 101))
    # 16 summands of float32 in another order: a few units in the last place, grown by the steps
    for one, other in zip(trail(exact), trail(fast), strict=True):
        assert one[3] == pytest.approx(other[3], rel=1e-4)
        assert one[4] == pytest.approx(other[4], rel=1e-3)


def test_the_fast_mode_is_named_in_the_plan_of_the_run(run):
    result = run(recipe("mlp", steps=2), plan=plan(4, 4, sync="fast"), data=splits("mlp", 40))
    assert Run(Path(result["run_dir"])).plan.sync == "fast"


# --- the hash sees what it should ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"seed": 1}, {"shards": 4}, {"micro_batches": 2}, {"clip": 0.01}])
def test_another_recipe_gives_other_bits(alone, change):
    short = recipe("gpt", steps=2)
    assert alone(short, 101)["weights_sha256"] != alone(replace(short, **change), 101)["weights_sha256"]


def test_more_workers_than_shards_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"^9 workers for 8 shards"):
        run(recipe("mlp"), 9, data=splits("mlp", 40), run_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()
