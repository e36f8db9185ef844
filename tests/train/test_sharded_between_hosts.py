"""Sharded states between workers that share no memory leave the bits of one worker: blocks come, and go again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torchrun_workers
from torchrun_workers import as_torchrun
from train import tiny_runs
from train.test_exactness import plan, trail
from train.tiny_runs import recipe, splits

from shoal.recipe.memory_plan import MemoryPlan
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.train.loop import Order, run_recipe

GPT = replace(tiny_runs.model("gpt"), options={"layers": 3, "heads": 2, "width": 64, "dropout": 0.1})
STATES = ("zero1", "zero2", "zero3")


@pytest.fixture
def joined(agent, tmp_path, request):
    """Train a recipe on workers that torch.distributed joins; the result of each."""
    cloudpickle.register_pickle_by_value(request.module)
    cloudpickle.register_pickle_by_value(torchrun_workers)
    count = 0

    def train(wanted: Recipe, how: Plan, data: Any, **options: Any) -> list[dict[str, Any]]:
        nonlocal count
        count += 1
        options.setdefault("run_dir", tmp_path / f"joined{count}")
        order = Order(wanted, how, data=data, **options)
        return agent.run(as_torchrun, (run_recipe, order), workers=how.workers)

    return train


@pytest.mark.parametrize("states", STATES)
def test_the_weights_are_those_of_one_worker(run, joined, states):
    """Dropout, clipping, unequal shares, a tail that leaves workers without work, checkpoints on the way."""
    often = replace(recipe("gpt").report, evaluate_every=4, checkpoint_every=5)
    wanted = recipe("gpt", model=GPT, clip=0.05, report=often, steps=12)
    data = splits("gpt", 67)
    one = run(wanted, 1, data=data)
    plans = [plan(4, 4, states=states), plan(1, 7, states=states, bucket_bytes=1)]
    plans.append(plan(2, 2, 3, 1, states=states, state_group=2, bucket_bytes=1))
    for other in plans:
        for result in joined(wanted, other, data):
            assert result["weights_sha256"] == one["weights_sha256"], other
            assert trail(result) == trail(one), other
            assert result["figures"] == one["figures"], other


@pytest.mark.parametrize("kind", ["cnn", "resnet", "lstm"])
def test_running_statistics_and_recurrent_layers_are_those_of_one_worker(run, joined, kind):
    wanted, data = recipe(kind, clip=0.05, steps=8), splits(kind, 67)
    one = run(wanted, 1, data=data)
    for result in joined(wanted, plan(3, 5, states="zero3", bucket_bytes=1), data):
        assert result["weights_sha256"] == one["weights_sha256"]
        assert trail(result) == trail(one)


def test_a_block_that_is_computed_again_finds_its_parameters(run, joined):
    wanted, data = recipe("gpt", model=GPT, steps=6, micro_batches=2), splits("gpt", 67)
    one = run(wanted, 1, data=data)
    for mode in ("full", "selective"):
        how = plan(3, 5, states="zero3", bucket_bytes=1, memory=MemoryPlan(recompute=mode))
        assert joined(wanted, how, data)[0]["weights_sha256"] == one["weights_sha256"], mode


def test_a_mixture_of_experts_whose_blocks_keep_losses_of_their_own_is_trained(run, joined):
    options = {"layers": 2, "heads": 2, "width": 64, "experts": 3, "top_k": 1, "dropout": 0.0}
    wanted = recipe("gpt", model=replace(GPT, kind="moe", options=options), steps=6)
    data = splits("gpt", 67)
    one = run(wanted, 1, data=data)
    assert (
        joined(wanted, plan(3, 5, states="zero3", bucket_bytes=1), data)[0]["weights_sha256"] == one["weights_sha256"]
    )


@pytest.mark.parametrize(("before", "after"), [("zero3", "zero1"), ("replicated", "zero3"), ("zero2", "replicated")])
def test_a_run_goes_on_with_other_states_on_another_number_of_workers(run, joined, before, after):
    wanted, data = recipe("gpt", model=GPT, clip=0.05, steps=12), splits("gpt", 67)
    whole = run(wanted, 1, data=data)
    part = joined(replace(wanted, steps=7), plan(3, 5, states=before, bucket_bytes=1), data)[0]
    folder = Path(part["run_dir"])
    rest = joined(wanted, plan(2, 2, 2, 2, states=after, bucket_bytes=1), data, run_dir=folder, resume=True)[0]
    assert rest["weights_sha256"] == whole["weights_sha256"]
    assert trail(rest) == trail(whole)
