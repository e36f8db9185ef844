"""In which numbers a model is served: chosen by time, within a guard; 8-bit layers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from serve.test_predictions import TEXTS
from torch import Tensor, nn

import shoal
from shoal.errors import UserError
from shoal.models.bert import Head
from shoal.serve import precision
from shoal.serve.int8 import Int8Linear, to_int8
from shoal.serve.options import ServeOptions
from shoal.serve.precision import Measured, choose, compared, fastest
from shoal.serve.target import load


def measured(dtype: str, one: float, full: float, agree: float = 1.0, error: float = 0.0) -> Measured:
    return Measured(dtype, {1: one, 32: full}, agree, error)


def test_the_fastest_over_all_numbers_of_rows_is_chosen_if_it_is_near_enough() -> None:
    plain = measured("float32", 1.0, 10.0)
    half, eight = measured("bfloat16", 0.6, 3.0), measured("int8", 0.4, 8.0)
    assert choose([plain, half, eight]).dtype == "bfloat16"
    assert choose([plain, measured("bfloat16", 0.6, 3.0, agree=0.9), eight]).dtype == "int8"
    assert choose([plain, measured("bfloat16", 0.6, 3.0, error=0.5), measured("int8", 0.98, 9.9)]).dtype == "float32"
    assert choose([plain, measured("bfloat16", 1.4, 9.0)]).dtype == "float32", "faster in one and slower in the other"


def test_an_8_bit_layer_is_near_the_layer_and_gives_a_row_its_bits_in_any_company() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 64)
    eight = Int8Linear(layer)
    rows = torch.randn(40, 3, 96)
    with torch.inference_mode():
        exact, near = layer(rows), eight(rows)
        assert float((near - exact).abs().max()) < 0.02 * float(exact.abs().max())
        assert near.shape == exact.shape
        for i in (0, 17, 39):
            assert torch.equal(eight(rows[i : i + 1])[0], near[i])
        assert torch.equal(eight(torch.zeros(2, 96)), layer.bias.expand(2, -1)), "a row of nothing but zeros"
    assert eight.weight.dtype == torch.int8


def test_a_layer_whose_weights_another_one_shares_stays_as_it_is() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(8, 4))
    assert to_int8(model) == 1
    assert model[0] is first
    assert isinstance(model[2], Int8Linear)


class Cancels(nn.Module):
    """Its answer is the small difference of two large numbers: it does not bear fewer bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        large = 1000.0 + 0.02 * self.layer(x)
        return (large - 1000.0) * 500.0


def test_fewer_bits_that_change_answers_are_not_chosen_however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"task": "classification", "dtype": "float32", "columns": list("abcdef")}
    times = iter(range(10_000))
    monkeypatch.setattr(precision.time, "perf_counter", lambda: 1.0 * next(times))  # all take equally long
    monkeypatch.setattr(precision, "FASTER", 1.1)
    seen: list[list[Measured]] = []
    monkeypatch.setattr(precision, "choose", lambda found: (seen.append(found), choose(found))[1])
    _, told = fastest(Cancels().eval().requires_grad_(False), facts, 4, 1)
    by_dtype = {one.dtype: one for one in seen[0]}
    assert set(by_dtype) == {"float32", "bfloat16", "int8"}
    assert not by_dtype["bfloat16"].near
    assert told["dtype"] != "bfloat16"
    assert (by_dtype["float32"].agree, by_dtype["float32"].error) == (1.0, 0.0)


def test_what_is_compared_is_what_the_task_answers() -> None:
    scores = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.2, 0.7]]).numpy()
    other = torch.tensor([[0.4, 0.5, 0.1], [0.1, 0.2, 0.7]]).numpy()
    assert compared({"scores": scores}, {"scores": other}) == (0.5, pytest.approx(0.1))
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).numpy()
    assert compared({"vectors": vectors}, {"vectors": 3 * vectors}) == (1.0, pytest.approx(0.0))
    assert compared({"output": vectors}, {"output": vectors + 0.5}) == (1.0, pytest.approx(0.25))


@pytest.mark.slow
def test_a_server_says_what_it_measured_and_answers_in_what_it_chose(folders: Callable[[Head], Path]) -> None:
    exact = load(str(folders("classification")))
    assert exact.facts["dtype"] == "float32"
    with shoal.serve(folders("classification"), dtype="auto", batch=4) as server:
        told = server.facts["precision"]
        assert server.facts["dtype"] == told["chosen"]
        assert {"1", "4"} == set(told["measured"][0]["ms"])
        plain = server.predict(text=TEXTS)
    with shoal.serve(folders("classification"), dtype="int8", batch=4, http=False) as server:
        eight = server.predict(text=TEXTS)
    for one, other in zip(plain, eight, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=0.05)


def test_numbers_that_a_model_cannot_be_served_in_are_one_line(folders: Callable[[Head], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no nn\.Linear layer"):
        precision.in_dtype(nn.Conv2d(1, 1, 1), "int8", "tensors")
    with pytest.raises(UserError, match="answer in one pass"):
        precision.in_dtype(nn.Linear(1, 1), "int8", "text-generation")
    with pytest.raises(UserError, match="on a mesh"):
        ServeOptions(dtype="auto", mesh={"tensor": 2})
    _, told = fastest(nn.Identity(), {"task": "tensors", "dtype": "float32"}, 4, 1)
    assert (told["dtype"], "is not known" in told["precision"]["why"]) == ("float32", True)
