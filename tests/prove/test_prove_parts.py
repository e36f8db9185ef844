"""The pure parts of the prover: plans, trees, the first difference, closeness."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_loop import added

from shoal.errors import UserError
from shoal.prove.closeness import check_room, deviations, first_beyond, keep, of_kinds, tensor_deviations
from shoal.prove.diagnosis import Evidence, looks_like
from shoal.prove.fingerprint import (
    LOSS,
    Difference,
    StepPrint,
    TensorPrint,
    along,
    first_difference,
    first_disagreement,
    layer_of,
    tensor_print,
)
from shoal.prove.plans import FAMILIES, families, label, of_families, standard_plans, uneven_placement
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


WEIGHTS = {"model/a": torch.tensor([4.0, -2.0]), "model/small": torch.tensor([1e-9]), "model/count": torch.tensor(3)}
GRADIENTS = {"gradient/a": torch.tensor([3.0, 0.0]), "gradient/b": torch.tensor([0.0, 4.0])}


@pytest.mark.parametrize(
    ("name", "found", "size"),
    [
        ("gradient/a", torch.tensor([0.0, 3.0]), 18**0.5 / 5),  # of the norm of all: an equal norm is not enough
        ("gradient/b", torch.tensor([0.0, torch.nan]), math.inf),
        ("model/a", torch.tensor([4.0, -2.5]), 0.5 / 4),
        ("model/small", torch.tensor([2e-9]), 1e-9 / 0.04),  # a hundredth of the largest weight is the least measure
        ("model/count", torch.tensor(4), math.inf),
        ("model/a", torch.tensor([4.0]), math.inf),
    ],
)
def test_a_deviation_counts_relative_to_the_whole_gradient_or_to_its_weight(name, found, size):
    expected = {**GRADIENTS, **WEIGHTS}
    sizes = tensor_deviations(expected, {**expected, name: found})
    assert sizes.pop(name) == pytest.approx(size, rel=1e-6)
    assert set(sizes.values()) == {0.0}


def test_a_tensor_that_is_missing_or_left_over_is_infinitely_far():
    expected = {**GRADIENTS, **WEIGHTS}
    assert tensor_deviations(expected, GRADIENTS)["model/a"] == math.inf
    assert tensor_deviations(GRADIENTS, expected)["model/a"] == math.inf


def test_a_proof_that_would_fill_the_disk_is_refused(tmp_path):
    check_room(tmp_path, GRADIENTS, steps=20)
    with pytest.raises(UserError, match="use fewer --steps"):
        check_room(tmp_path, GRADIENTS, steps=10**18)


def test_weights_are_left_out_where_they_are_no_measure_and_losses_name_their_shards(tmp_path):
    keep(tmp_path, 2, {**GRADIENTS, **WEIGHTS, "optimizer/a/step": torch.tensor(2.0)})
    run = {
        **GRADIENTS,
        "model/a": torch.tensor([40.0, 0.0]),
        "model/small": torch.zeros(1),
        "model/count": torch.tensor(3),
    }
    found = [deviations(tmp_path, 2, run, (2.0, 3.0, 0.0), (2.0, 3.3, 0.0))]
    seen = first_beyond(of_kinds(found, weights=True), 1e-5, workers=2)
    assert (seen.step, seen.tensor, seen.layer, seen.ranks, seen.shards) == (2, "model/a", "a", (0, 1), (1,))
    seen = first_beyond(of_kinds(found, weights=False), 1e-5, workers=2)
    assert (seen.tensor, seen.shards, seen.tensors) == (LOSS, (1,), ())
    assert first_beyond(of_kinds(found, weights=False), 0.11, workers=2) is None


def test_workers_may_hold_parts_as_long_as_all_of_it_is_held():
    names = [NAMES[:2], NAMES[1:]]
    parts = [[replace(p, tensors={n: p.tensors[n] for n in own}) for p in run_of(2)] for own in names]
    assert first_difference(run_of(2), parts, parts=True) is None
    assert first_difference(run_of(2), parts).tensor == NAMES[0]
    found = first_difference(run_of(2), parts[1:], parts=True)
    assert (found.tensor, found.ranks) == (NAMES[0], (0,))
    wrong = changed(parts[0], 2, NAMES[0], TensorPrint("other", 1.0))
    found = first_difference(run_of(2), [wrong, parts[1]], parts=True)
    assert (found.step, found.tensor, found.ranks) == (2, NAMES[0], (0,))


def test_what_a_worker_cannot_show_is_not_missed():
    weights = [replace(p, tensors={n: t for n, t in p.tensors.items() if n.startswith("model")}) for p in run_of(2)]
    kinds = [("gradient", "model", "optimizer"), ("model",)]
    assert first_difference(run_of(2), [run_of(2), weights], kinds) is None
    assert first_difference(run_of(2), [weights, run_of(2)], kinds).ranks == (0,)


def test_replicas_that_part_are_named_though_no_bit_is_known():
    other = changed(run_of(3), 2, "model/a", TensorPrint("other", 1.0))
    assert first_disagreement([[0, 2], [1, 3]], [run_of(3), other, run_of(3), other]) is None
    kinds = [("model", "gradient", "optimizer"), ("gradient",)]  # the other cannot show its weights
    assert first_disagreement([[0, 1]], [run_of(3), other], kinds) is None
    found = first_disagreement([[0, 2], [1, 3]], [run_of(3), run_of(3), run_of(3), other])
    assert (found.step, found.tensor, found.ranks) == (2, "model/a", (3,))


def test_a_layer_is_what_holds_the_tensor():
    assert [layer_of(name) for name in ("gradient/a.b.weight", "optimizer/a.b.weight/step", "model/bias", LOSS)] == [
        "a.b",
        "a.b",
        "bias",
        "",
    ]


# --- what a difference looks like ---------------------------------------------------------------------------------

TERMS = {name: [torch.randn(6, generator=torch.Generator().manual_seed(seed * 10 + s)) for s in range(4)]
         for seed, name in enumerate(("gradient/a.weight", "gradient/b.weight"))}  # fmt: skip


def print_of(sums, step=3, losses=(1.0, 2.0, 3.0, 4.0), **more):
    return StepPrint(step, losses, {name: tensor_print(tensor) for name, tensor in sums.items()}, **more)


def reference_print():
    shares = {name: tuple(map(along, terms)) for name, terms in TERMS.items()}
    return print_of({name: sum(terms) for name, terms in TERMS.items()}, shares=shares)


def said_of(sums, losses=(1.0, 2.0, 3.0, 4.0), uses=None, **more):
    wanted, found = reference_print(), print_of(sums, losses=losses)
    difference = first_difference([wanted], [[found]])
    return looks_like(difference, Evidence(wanted, None, {0: found}, uses or {}, **more))


@given(first=st.integers(0, 3), more=st.integers(0, 2), count=st.sampled_from([0, 2]))
def test_shards_that_are_missing_or_counted_twice_are_recognised(first, more, count):
    last = min(first + more, 3 if first else 2)
    times = [count if first <= shard <= last else 1 for shard in range(4)]
    sums = {name: sum(t * n for t, n in zip(terms, times, strict=True)) for name, terms in TERMS.items()}
    shards = f"shard {first} is" if first == last else f"shards {first} to {last} are"
    assert said_of(sums) == f"the gradient of {shards} {'in the sum twice' if count else 'missing from the sum'}"


@pytest.mark.parametrize(("scale", "says"), [(0.25, "scaled by 0.25"), (2.0, "scaled by 2: it was counted twice")])
def test_a_scale_is_recognised(scale, says):
    assert said_of({name: scale * sum(terms) for name, terms in TERMS.items()}) == f"the gradient is {says}"


def test_what_fits_nothing_is_not_explained_away():
    noise = {name: sum(terms) + torch.linspace(0, 1, 6) for name, terms in TERMS.items()}
    assert said_of(noise) == "the backward pass computes something else, though every loss is right"
    one = {name: sum(terms) + (name == "gradient/a.weight") * torch.linspace(0, 1, 6) for name, terms in TERMS.items()}
    assert "a.weight is tied, used in 2 places" in said_of(one, uses={"a.weight": 2})
    assert "tied" not in said_of(noise, uses={"a.weight": 2})


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ((1.0, 2.0, 3.5, 4.0), "another random stream, in shard 2"),
        ((1.0, 2.5, 2.5, 4.0), "samples of shards 1, 2 changed places"),
        ((1.1, 2.1, 3.1, 4.1), "every shard: look at the halo rows"),
    ],
)
def test_losses_tell_where_the_forward_pass_went_wrong(losses, says):
    noise = {name: sum(terms) + torch.linspace(0, 1, 6) for name, terms in TERMS.items()}
    assert says in said_of(noise, losses=losses, crossing="the halo rows")


def test_a_weight_that_stays_behind_is_told_from_one_that_is_wrong():
    weights = [print_of({"model/a": torch.tensor([float(step)])}, step=step) for step in (1, 2)]
    for found, says in ((1.0, "a was not updated on rank 5"), (1.5, "the update is not")):
        difference = Difference(2, "model/a", (5,), (), ("model/a",))
        late = {5: print_of({"model/a": torch.tensor([found])}, step=2)}
        assert says in looks_like(difference, Evidence(weights[1], weights[0], late, {}))


def test_plans_belong_to_families_by_what_they_do():
    every = [
        Plan(mesh={"data": 2}, sync="fast"),
        Plan(mesh={"pipe": 2, "tensor": 2}),
        Plan(mesh={"data": 2}, states="zero1"),
    ]
    assert [families(plan) - {"standard"} for plan in every] == [
        {"data", "fast"},
        {"pipe", "tensor"},
        {"data", "states"},
    ]
    assert of_families(every, ["states", "pipe"]) == (every[1], every[2])
    assert of_families(every, ["standard"]) == tuple(every)
    with pytest.raises(UserError, match="did you mean 'tensor'"):
        of_families(every, ["tensors"])
    assert "standard" in FAMILIES


def test_a_fingerprint_sees_the_sign_of_zero_the_shape_and_the_type():
    zero = torch.zeros(4)
    prints = [tensor_print(t).sha256 for t in (zero, -zero, zero.view(2, 2), zero.int(), zero.bfloat16())]
    assert len(set(prints)) == len(prints)
    assert tensor_print(torch.tensor([3.0, 4.0])).norm == 5.0
