"""What differs between two sets of tensors, bit for bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.train import checkpoint_diff
from shoal.train.checkpoint_diff import Changed, compare, norm


def test_equal_sets_have_no_first_difference():
    state = {"a": torch.randn(3), "nan": torch.tensor([math.nan]), "empty": torch.empty(0), "one": torch.tensor(True)}
    found = compare(state, {name: tensor.clone() for name, tensor in state.items()})
    assert (found.first, found.equal, found.max_abs) == (None, 4, 0.0)


def test_every_kind_of_difference_is_named():
    first = {
        "a": torch.ones(2),
        "gone": torch.ones(1),
        "shape": torch.ones(2, 3),
        "dtype": torch.ones(2),
        "v": torch.ones(4),
    }
    second = {
        "a": torch.ones(2),
        "new": torch.ones(1),
        "shape": torch.ones(3, 2),
        "dtype": torch.ones(2).bfloat16(),
        "v": torch.tensor([1.0, 1.25, 1.0, 0.5]),
    }
    found = compare(first, second)
    assert found.only_first == ("gone",)
    assert found.only_second == ("new",)
    assert found.unlike == (("dtype", "float32 [2]", "bfloat16 [2]"), ("shape", "float32 [2, 3]", "float32 [3, 2]"))
    assert found.changed == (Changed("v", 0.5, 2, 4),)
    assert (found.first, found.equal, found.max_abs) == ("dtype", 1, 0.5)


@pytest.mark.parametrize(
    ("a", "b", "max_abs"),
    [
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), 0.0),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1.0),
        (torch.tensor([250], dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8), 5.0),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 3j]), 2.0),
        (torch.tensor(2.0).bfloat16(), torch.tensor(3.0).bfloat16(), 1.0),
        (torch.tensor([2.0]).to(torch.float8_e4m3fn), torch.tensor([3.0]).to(torch.float8_e4m3fn), 1.0),
        (torch.arange(2.0)[::2], torch.tensor([4.0]), 4.0),  # of size 1, with a stride of 2
        (torch.tensor([math.inf]), torch.tensor([1.0]), math.inf),
    ],
)
def test_the_largest_difference_is_taken_in_float64_whatever_the_dtype(a, b, max_abs):
    [changed] = compare({"x": a}, {"x": b}).changed
    assert (changed.max_abs, changed.elements) == (max_abs, 1)


def test_a_nan_on_one_side_is_the_largest_difference_of_all():
    found = compare(
        {"x": torch.tensor([1.0, 5.0]), "y": torch.ones(1)}, {"x": torch.tensor([math.nan, 1.0]), "y": torch.zeros(1)}
    )
    assert math.isnan(found.changed[0].max_abs)
    assert math.isnan(found.max_abs)


@given(size=st.integers(1, 50), block=st.integers(1, 20), data=st.data())
def test_blocks_of_any_size_find_the_same_difference(size, block, data):
    a = torch.arange(float(size))
    b = a.clone()
    places = data.draw(st.sets(st.integers(0, size - 1)))
    for place in places:
        b[place] += place + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_diff, "_BLOCK", block)
        found = compare({"x": a}, {"x": b})
        assert norm(a) == pytest.approx(torch.linalg.vector_norm(a.double()).item(), rel=1e-12)
    assert found.changed == ((Changed("x", max(places) + 1.0, len(places), size),) if places else ())


def test_the_norm_is_defined_for_every_kind_of_tensor():
    assert norm(torch.tensor([3.0, 4.0]).bfloat16()) == 5.0
    assert norm(torch.tensor([True, True, True, True])) == 2.0
    assert norm(torch.tensor([3 + 4j])) == 5.0
    assert norm(torch.empty(0)) == 0.0
    assert norm(torch.tensor(7)) == 7.0
