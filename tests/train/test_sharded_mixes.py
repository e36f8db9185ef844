"""Sharded states with every axis of the mesh leave the bits of the same mesh with replicated ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torchrun_workers import as_torchrun
from train.test_sharded_between_hosts import joined  # noqa: F401 (a fixture)
from train.test_split_models import loaded, over
from train.tiny_runs import recipe, splits

from shoal.recipe.recipe import ModelSpec
from shoal.train.loop import Order, run_recipe
from shoal.train.sharded_sets import ShardedSets

GPT = ModelSpec(kind="gpt", options={"layers": 4, "heads": 2, "width": 80, "dropout": 0.1})  # ten blocks
MOE = ModelSpec(kind="moe", options={"layers": 2, "heads": 2, "width": 64, "experts": 4, "dropout": 0.1})


def wanted_of(model: ModelSpec) -> Any:
    return recipe("gpt", model=model, clip=0.05, micro_batches=2, steps=3)


def same(found: dict[str, Any], whole: dict[str, Any]) -> bool:
    ours, theirs = loaded(found), loaded(whole)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


HERE = {
    "interleaved": (GPT, over("interleaved", 2, data=2, pipe=2), "zero3"),
    "two halves": (GPT, over("zb-v", 2, data=2, pipe=2), "zero2"),
    "sequences": (GPT, over(context=2), "zero3"),
    "experts": (MOE, over(expert=2), "zero3"),
    "experts twice": (MOE, over(data=2, expert=2), "zero2"),
    "experts cut": (MOE, over(data=2, expert=2, tensor=2), "zero1"),
}
BETWEEN_HOSTS = {
    "chunks": (GPT, over("zb-v", 2, data=2, pipe=2)),
    "sequences": (GPT, over(context=2)),
    "experts": (MOE, over(data=2, expert=2)),
}


@pytest.mark.parametrize(("model", "plan", "states"), HERE.values(), ids=list(HERE))
def test_chunks_sequences_and_experts_share_their_states(run, model, plan, states):
    """Weights, states and figures are equal; a checkpoint holds whole tensors."""
    wanted, data = wanted_of(model), splits("gpt", 67)
    whole = run(wanted, plan=plan, data=data)
    found = run(wanted, plan=replace(plan, states=states, bucket_bytes=1), data=data)
    assert same(found, whole)
    assert found["loss"] == whole["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "plan"), BETWEEN_HOSTS.values(), ids=list(BETWEEN_HOSTS))
def test_between_hosts_they_do_so_too(run, joined, model, plan):  # noqa: F811
    """Where no memory is shared, blocks or whole chunks come in for the passes that need them."""
    wanted, data = wanted_of(model), splits("gpt", 67)
    whole = run(wanted, plan=plan, data=data)
    found = joined(wanted, replace(plan, states="zero3", bucket_bytes=1), data)[0]
    assert same(found, whole)
    assert found["loss"] == whole["loss"]


def _counted(group: Any, order: Order) -> list[dict[str, int]]:
    """What a worker holds after each update, before anything of the next step has been asked for."""
    held, step = [], ShardedSets.step

    def counting(sets: ShardedSets, number: int, figures: Any) -> None:
        step(sets, number, figures)
        held.append(sets.held_bytes())

    ShardedSets.step = counting  # in the worker, which is a process of its own
    run_recipe(group, order)
    return held


def test_a_stage_holds_its_slices_alone_between_two_steps(agent, joined, tmp_path):  # noqa: F811
    untied = replace(GPT, options={**GPT.options, "tied": False})
    plan = replace(over(data=2, pipe=2), states="zero3", bucket_bytes=1)
    order = Order(wanted_of(untied), plan, data=splits("gpt", 67), run_dir=tmp_path / "run")
    for counts in agent.run(as_torchrun, (_counted, order), workers=4):
        assert len(counts) == 3
        for held in counts:
            assert held["gathered"] <= 8192  # the page that two slices share
            assert held["parameters"] >= 4 * 32768


def test_a_mixed_run_goes_on_with_other_states_in_another_layout(run):
    wanted, data = replace(wanted_of(GPT), steps=6), splits("gpt", 67)
    whole = run(wanted, 1, data=data)
    part = run(replace(wanted, steps=3), plan=replace(over("zb-v", 2, data=2, pipe=2), states="zero3"), data=data)
    rest = run(wanted, plan=replace(over(data=3), states="zero2"), data=data, resume=part["run_dir"])
    assert rest["weights_sha256"] == whole["weights_sha256"]
