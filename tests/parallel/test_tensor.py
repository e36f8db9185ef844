"""A model split over the tensor axis learns what the whole model learns."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import cloudpickle
import pytest
import tiny_models
import torch
from parallel import split_cases, split_runs
from parallel.split_cases import CASES, IN_FOUR, IN_THREE, IN_TWO
from parallel.split_runs import Outcome, run_case, worst

from shoal.comm.tensors import make_collectives
from shoal.errors import RunFailed, UserError
from shoal.models.registry import build
from shoal.parallel.layout.decide import layout_of
from shoal.parallel.layout.split import even_split
from shoal.parallel.tensor import apply, banded, crossing, halo, mixture
from shoal.parallel.tensor.apply import split_model
from shoal.parallel.tensor.whole import join_tensors, own_parts
from shoal.recipe.recipe import ModelSpec

for module in (split_cases, split_runs, tiny_models):
    cloudpickle.register_pickle_by_value(module)

DOUBLE = 1e-10  # in float64 only the order of sums differs
SINGLE = 1e-5


def _run_all(group: Any, cases: list[Any]) -> list[Outcome]:
    return [run_case(group, case) for case in cases]


@cache
def _whole(name: str) -> Outcome:
    return run_case(None, CASES[name])


Outcomes = dict[str, list[Outcome]]  # case -> what each worker has found


def _outcomes(on_workers: Callable[..., list[Any]], ways: int, names: list[str]) -> Outcomes:
    by_rank = on_workers(ways, _run_all, [CASES[name] for name in names])
    return {name: [outcomes[i] for outcomes in by_rank] for i, name in enumerate(names)}


@pytest.mark.parametrize(("ways", "names"), [(2, IN_TWO), (3, IN_THREE), (4, IN_FOUR)], ids=["2", "3", "4"])
def test_losses_gradients_weights_and_evaluation_are_those_of_the_whole_model(on_workers, ways, names):
    for name, outcomes in _outcomes(on_workers, ways, names).items():
        expected = _whole(name)
        for found in outcomes:
            assert found.losses == pytest.approx(expected.losses, rel=DOUBLE), name
            assert found.figures == pytest.approx(expected.figures, rel=DOUBLE), name
            assert set(found.gradients) == set(expected.gradients), name
            assert worst(found.gradients, expected.gradients)[0] < DOUBLE, (
                name,
                worst(found.gradients, expected.gradients),
            )
            assert worst(found.tensors, expected.tensors)[0] < DOUBLE, (name, worst(found.tensors, expected.tensors))
        first = outcomes[0].replicated
        for other in outcomes[1:]:
            assert all(torch.equal(first[key], other.replicated[key]) for key in first), name


def test_in_float32_the_tolerance_is_that_of_float32_and_two_runs_have_the_same_bits(on_workers):
    names = ["gpt", "gpt-sliced", "bert-masked", "mlp"]
    cases = [replace(CASES[name], dtype=torch.float32, steps=2) for name in names]
    once, again = (on_workers(2, _run_all, cases) for _ in range(2))
    for index, case in enumerate(cases):
        expected = run_case(None, case)
        found, repeated = once[0][index], again[0][index]
        assert found.losses == pytest.approx(expected.losses, rel=SINGLE)
        assert worst(found.gradients, expected.gradients)[0] < SINGLE
        assert found.losses == repeated.losses
        assert all(torch.equal(found.tensors[key], repeated.tensors[key]) for key in found.tensors)


def _forgetful(group: Any, case: Any, forgotten: str) -> Outcome:
    """As `run_case`, with one kind of collective left out."""
    carry_out = crossing.carry_out

    def without(operation: Any, *arguments: Any) -> Any:
        return arguments[0] if operation == forgotten else carry_out(operation, *arguments)

    crossing.carry_out = without
    return run_case(group, case)


@pytest.mark.parametrize(
    ("name", "forgotten"), [("gpt", "all-reduce"), ("gpt-sliced", "reduce-scatter"), ("cnn-joined", "all-gather")]
)
def test_a_missing_collective_is_seen(on_workers, name, forgotten):
    try:
        found = on_workers(2, _forgetful, CASES[name], forgotten)[0]
    except RunFailed:
        return  # what should have been joined or cut has another shape
    assert worst(found.gradients, _whole(name).gradients)[0] > 1e-3


def _without_halo(group: Any, case: Any) -> Outcome:
    """The first halo row of each band is lost on its way."""
    fetch = halo.fetch_rows

    def lossy(x: torch.Tensor, window: Any, collectives: Any) -> torch.Tensor:
        rows = fetch(x, window, collectives)
        return torch.cat([torch.zeros_like(rows[:, :, :1]), rows[:, :, 1:]], 2) if collectives.rank else rows

    banded.fetch_rows = lossy
    return run_case(group, case)


def _with_a_mask_of_its_own(group: Any, case: Any) -> Outcome:
    """Each worker draws dropout for its part alone."""
    apply.part_of = lambda *_: None
    return run_case(group, case)


def _adding_what_is_whole(group: Any, case: Any) -> Outcome:
    """The gradient that leaves a mixture is whole on every worker, and is added up all the same."""
    mixture.JOIN = replace(mixture.JOIN, backward="reduce-scatter")
    return run_case(group, case)


@pytest.mark.parametrize(
    ("name", "plant"),
    [("cnn-rows", _without_halo), ("mlp", _with_a_mask_of_its_own), ("moe-sliced", _adding_what_is_whole)],
)
def test_a_lost_halo_row_a_wrong_mask_and_a_double_count_are_seen(on_workers, name, plant):
    found = on_workers(2, plant, CASES[name])[0]
    assert worst(found.gradients, _whole(name).gradients)[0] > 1e-3


def _load_and_hash(group: Any, case: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a whole state becomes when it is cut, loaded and joined again."""
    torch.manual_seed(0)
    model = build(ModelSpec(kind=case.kind, options=case.options), case.facts)
    layout, collectives = layout_of(model, model.dimensions(), {}, group.world), make_collectives(group)
    split_model(model, layout, collectives)
    generator = torch.Generator().manual_seed(5)
    state = model.state_dict()
    shapes = {n: t.shape for n, t in join_tensors(state, layout.splits, collectives).items()}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model.load_state_dict(own_parts(given, layout.splits, group.rank))
    return given, join_tensors(model.state_dict(), layout.splits, collectives)


def test_a_state_that_is_cut_loaded_and_joined_is_the_state(on_workers):
    for given, joined in on_workers(3, _load_and_hash, CASES["gpt"]):
        assert all(torch.equal(given[name], joined[name]) for name in given)


def test_a_state_of_another_size_is_refused():
    split = even_split(0, "tensor", 6, 2)
    with pytest.raises(UserError, match=r"'w' \[5\] must have 6 elements in dim 0 to be split as the plan says"):
        own_parts({"w": torch.zeros(5)}, {"w": split}, 0)
