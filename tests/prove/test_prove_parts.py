"""The pure parts of the prover: plans, trees, the first difference, closeness."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_loop import added

from shoal.errors import UserError
from shoal.prove.closeness import deviations, first_beyond
from shoal.prove.fingerprint import LOSS, StepPrint, TensorPrint, first_difference, tensor_print
from shoal.prove.plans import label, standard_plans, uneven_placement
from shoal.prove.reference import block_norm, tree_sum
from shoal.recipe.plan import Plan

NAMES = ("gradient/a", "gradient/b", "model/a", "model/b", "optimizer/a/step")


def run_of(steps, shards=3):
    return [
        StepPrint(
            step, tuple(2.0 + shard for shard in range(shards)), {n: TensorPrint(f"{step}{n}", 1.0) for n in NAMES}
        )
        for step in range(1, steps + 1)
    ]


def changed(prints, step, name, found):
    tensors = {**prints[step - 1].tensors, name: found}
    return [*prints[: step - 1], replace(prints[step - 1], tensors=tensors), *prints[step:]]


@given(workers=st.integers(1, 12), more=st.integers(0, 12))
def test_an_uneven_placement_gives_every_worker_a_shard_and_one_of_them_the_rest(workers, more):
    placement = uneven_placement(workers, workers + more)
    assert Plan(mesh={"data": workers}, placement=placement).owned(workers + more)
    assert sorted(placement)[-1] == 1 + more


def test_the_standard_plans_are_even_uneven_and_fast():
    assert [label(plan) for plan in standard_plans((1, 2, 3, 4, 5, 8), 8)] == [
        *(f"data={count}" for count in (1, 2, 3, 4, 5, 8)),
        "data=2 placement=1+7",
        "data=5 placement=1+1+4+1+1",
        "data=8 fast",
    ]
    assert [label(plan) for plan in standard_plans((1,), 8)] == ["data=1"]
    assert [label(plan) for plan in standard_plans((2,), 3)] == ["data=2", "data=2 placement=1+2", "data=2 fast"]
    with pytest.raises(UserError, match="9 workers for 8 shards"):
        standard_plans((1, 9), 8)


def test_a_label_names_whatever_sets_a_plan_apart():
    assert label(Plan(mesh={"data": 2}, bucket_bytes=4096, prefetch=0)) == "data=2 bucket_bytes=4096 prefetch=0"


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_two_trees_by_two_hands_add_in_the_same_order(present):
    draw = torch.Generator().manual_seed(len(present))
    leaves = [[torch.randn(7, generator=draw)] if there else None for there in present]
    one, other = tree_sum(range(len(leaves)), leaves.__getitem__), added(leaves)
    assert (one is None) == (other is None) == (not any(present))
    if one is not None:
        assert torch.equal(one[0], other[0])


def test_the_global_norm_is_that_of_all_elements_and_nan_where_one_is():
    gradients = [torch.full((5, 7), 2.0), torch.full((40000,), -1.0)]
    assert block_norm(gradients) == (4 * 35 + 40000) ** 0.5
    assert not block_norm([torch.tensor([1.0, torch.inf])]) < torch.inf


@given(step=st.integers(1, 4), rank=st.integers(0, 2), name=st.sampled_from(NAMES), later=st.sampled_from(NAMES))
def test_the_first_difference_is_the_first_in_step_then_in_order(step, rank, name, later):
    workers = [run_of(4) for _ in range(3)]
    assert first_difference(run_of(4), workers) is None
    workers[rank] = changed(workers[rank], step, name, TensorPrint("other", 1.0))
    if step < 4:
        workers[rank] = changed(workers[rank], 4, later, TensorPrint("other", 1.0))
    found = first_difference(run_of(4), workers)
    assert (found.step, found.tensor, found.ranks, found.shards) == (step, name, (rank,), ())


def test_tensors_that_are_missing_or_left_over_and_other_losses_are_differences():
    short = [replace(p, tensors={n: t for n, t in p.tensors.items() if n != "model/a"}) for p in run_of(2)]
    assert first_difference(run_of(2), [short]).tensor == "model/a"
    assert first_difference(short, [run_of(2)]).tensor == "model/a"
    lossy = [run_of(2)[0], replace(run_of(2)[1], losses=(2.0, 3.5, 4.0))]
    found = first_difference(run_of(2), [lossy])
    assert (found.step, found.tensor, found.shards) == (2, LOSS, (1,))


def test_a_run_that_broke_off_is_compared_as_far_as_it_came():
    assert first_difference(run_of(4), [run_of(2), []]) is None


@pytest.mark.parametrize(("norm", "beyond"), [(1.0 + 1e-6, False), (1.1, True), (float("nan"), True)])
def test_a_fast_run_may_move_a_gradient_within_the_tolerance_only(norm, beyond):
    run = changed(run_of(3), 2, "gradient/b", TensorPrint("other", norm))
    run = changed(run, 1, "model/a", TensorPrint("other", 50.0))  # weights are no measure
    found = first_beyond(list(deviations(run_of(3), run)), 1e-5, workers=2)
    assert (found is not None) == beyond
    if found:
        assert (found.step, found.tensor, found.ranks, found.shards) == (2, "gradient/b", (0, 1), ())


def test_a_fingerprint_sees_the_sign_of_zero_the_shape_and_the_type():
    zero = torch.zeros(4)
    prints = [tensor_print(t).sha256 for t in (zero, -zero, zero.view(2, 2), zero.int(), zero.bfloat16())]
    assert len(set(prints)) == len(prints)
    assert tensor_print(torch.tensor([3.0, 4.0])).norm == 5.0
