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

from shoal.parallel.tensor import crossing

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


def test_a_missing_all_reduce_is_seen(on_workers):
    found = on_workers(2, _forgetful, CASES["gpt"], "all-reduce")[0]
    assert worst(found.gradients, _whole("gpt").gradients)[0] > 1e-3
