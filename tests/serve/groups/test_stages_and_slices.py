"""One model in several processes gives what it gives in one: to the bit by stages, within rounding by slices."""

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serve.groups.forked_groups import forked, made
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.models.bert import Bert, BertConfig
from shoal.models.cnn import CNN, CNNConfig
from shoal.models.gpt import GPT, GPTConfig
from shoal.models.lstm import LSTM, LSTMConfig
from shoal.models.mlp import MLP, MLPConfig
from shoal.models.resnet import ResNet, ResNetConfig
from shoal.serve.engine import Begun, Failed
from shoal.serve.groups.mesh import plan_of
from shoal.serve.options import ServeOptions
from shoal.serve.payloads import Inputs, array

TOLERANCE = 1e-5  # relative to the largest number, in float32: sums in another order
Case = tuple[nn.Module, dict[str, Any], list[dict[str, np.ndarray]]]
TEXT = {"dtype": "float32", "context": 32, "vocab": 40, "pad": 0, "tokenizer": {}}


def drawn(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def texts(*shapes: tuple[int, int], types: bool = False) -> list[dict[str, np.ndarray]]:
    found = []
    for number, shape in enumerate(shapes):
        one = {"tokens": drawn(number).integers(0, 40, shape, np.int32)}
        found.append(one | ({"types": drawn(number).integers(0, 2, shape, np.int32)} if types else {}))
    return found


def encoder() -> Case:
    model = Bert(BertConfig(layers=3, heads=2, width=32, context=32, vocab=40, classes=3), "classification")
    asked = [*texts((1, 8), (2, 5), (1, 13)), *texts((2, 8), (1, 3), types=True)]
    return model, {**TEXT, "task": "sequence-classification"}, asked


def embeddings() -> Case:
    model = Bert(BertConfig(layers=2, heads=4, width=32, context=32, vocab=40), "encoder")
    return model, {**TEXT, "task": "embeddings", "pooling": "mean", "normalise": True}, texts((3, 8), (1, 6), (1, 16))


def language_model() -> Case:
    model = GPT(GPTConfig(layers=2, heads=2, width=32, context=32, vocab=40))
    return model, {**TEXT, "task": "tensors"}, texts((2, 8), (1, 8))


def recurrent() -> Case:
    model = LSTM(LSTMConfig(layers=2, width=16, vocab=40, context=32))
    return model, {**TEXT, "task": "tensors"}, texts((2, 8), (1, 8))


def images(model: nn.Module, size: int) -> Case:
    facts = {"dtype": "float32", "task": "image-classification", "shape": [1, size, size]}
    return model, facts, [{"input": drawn(n).random((n, 1, size, size), np.float32)} for n in (1, 3, 4)]


def convolutions() -> Case:
    return images(CNN(CNNConfig(shape=(1, 12, 12), classes=4, channels=(4, 6), hidden=8)), 12)


def residual() -> Case:
    return images(ResNet(ResNetConfig(shape=(1, 16, 16), classes=4, depth=8)), 16)


def table() -> Case:
    facts = {"dtype": "float32", "task": "classification", "shape": [6]}
    model = MLP(MLPConfig(features=6, classes=3, hidden=(16, 8)))
    return model, facts, [{"input": drawn(n).random((n, 6), np.float32)} for n in (1, 4)]


def yours() -> Case:
    """A module that nobody has an example for."""
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    facts = {"dtype": "float32", "task": "tensors"}
    return model, facts, [{"input": drawn(n).random((n, 5), np.float32)} for n in (1, 2, 4)]


STAGED = [encoder, embeddings, language_model, recurrent, convolutions, residual, table, yours]
SLICED = [encoder, embeddings, language_model, convolutions]


def prepared(case: Callable[[], Case]) -> Case:
    torch.manual_seed(0)
    model, facts, asked = case()
    for parameter in model.parameters():  # far enough from 0 that inputs matter
        parameter.data.mul_(3.0)
    return model.eval().requires_grad_(False), facts, asked


def answered(case: Callable[[], Case], mesh: dict[str, int]) -> list[dict[str, np.ndarray]]:
    """Each request's outputs when it has a batch of its own, so that nothing depends on who comes when."""
    model, facts, asked = prepared(case)
    with forked(model, facts, mesh) as group:
        return [group.predict(one)[0] for one in asked]


@pytest.mark.parametrize("case", STAGED, ids=lambda case: case.__name__)
def test_stages_give_the_bits_of_one_process(case: Callable[[], Case]) -> None:
    alone = answered(case, {})
    for got, want in zip(answered(case, {"pipe": 2}), alone, strict=True):
        assert got.keys() == want.keys()
        assert all(np.array_equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("case", SLICED, ids=lambda case: case.__name__)
@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"pipe": 2, "tensor": 2}], ids=["tensor", "pipe and tensor"])
def test_slices_give_the_numbers_of_one_process_within_rounding(case: Callable[[], Case], mesh: dict[str, int]) -> None:
    alone, first, again = answered(case, {}), answered(case, mesh), answered(case, mesh)
    for got, same, want in zip(first, again, alone, strict=True):
        for name, expected in want.items():
            assert np.abs(got[name] - expected).max() <= TOLERANCE * np.abs(expected).max()
            assert np.array_equal(got[name], same[name]), "slices equal themselves"


def test_every_process_maps_the_weights_of_its_own_place_and_no_others() -> None:
    model, facts, asked = prepared(encoder)
    whole = sum(tensor.nbytes for tensor in model.parameters())
    split = made(model, facts, plan_of({"pipe": 2, "tensor": 2}))
    with forked(model, facts, {"pipe": 2, "tensor": 2}, split) as group:
        group.predict(asked[0])
        mapped = [weights_mapped(pid) for pid in group.pids]
    assert all(0 < bytes_ < 0.45 * whole + 2 * 4096 for bytes_ in mapped)
    assert whole <= split.bytes <= sum(mapped) < whole + 40_000, "what every slice needs, and ends of pages"
    assert all(t.untyped_storage().nbytes() <= 8 for t in model.parameters()), "the parent keeps no copy"


def weights_mapped(pid: int) -> int:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if "shoal-weights" in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in ranges)


class Gate(nn.Module):
    """Passes once for each byte that comes through a pipe."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self.pipe, self.scale = pipe, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        os.read(self.pipe, 1)
        return x * self.scale


class Fault(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if (x == 777).any():
            raise RuntimeError("a fault of the model")
        return x * self.scale


def asking(*numbers: float) -> Inputs:
    return Inputs(1, 0, {"input": array(np.array([numbers], np.float32))})


def test_a_batch_enters_the_first_stage_while_the_one_before_is_in_the_second() -> None:
    opens, opened = os.pipe()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Gate(opens)).eval().requires_grad_(False)
    facts = {"dtype": "float32", "task": "tensors"}
    split = made(model, facts, plan_of({"pipe": 3}))
    with forked(model, facts, {"pipe": 3}, split, batch=1) as group:
        ids = [group.send(asking(float(n), 0.0)) for n in range(4)]
        begun = [group.hear() for _ in range(4)]  # none has been answered: nothing has gone through the gate
        together = [tuple(ids[:count]) for count in (1, 2, 3, 4)]
        assert [one.ids for one in begun] == together, "one at each stage, and one ahead"
        os.write(opened, b"****")
        assert all(not isinstance(answer, Failed) for answer in group.answers(ids).values())
    os.close(opens)
    os.close(opened)


def test_a_fault_in_a_later_stage_harms_no_other_request_of_its_batch() -> None:
    opens, opened = os.pipe()
    model = nn.Sequential(Gate(opens), Fault()).eval().requires_grad_(False)
    with forked(model, {"dtype": "float32", "task": "tensors"}, {"pipe": 2}, batch=3) as group:
        ids = [group.send(asking(n, 1.0)) for n in (1.0, 777.0, 2.0)]
        os.write(opened, b"*" * 8)
        told = group.answers(ids)
        assert [isinstance(told[id], Failed) for id in ids] == [False, True, False]
        assert "a fault of the model" in told[ids[1]].why  # type: ignore[union-attr]
    os.close(opens)
    os.close(opened)


@pytest.mark.parametrize("all_fail", [False, True], ids=["one slice", "all slices"])
def test_a_slice_that_fails_alone_ends_its_group_at_once_with_its_error(all_fail: bool, capfd: Any) -> None:
    """Without a word the others would wait for its part of a sum. What all slices raise is the request's, as ever."""
    model, facts, asked = prepared(encoder)
    faults, plant = os.pipe()
    os.set_blocking(faults, False)

    def fail(module: nn.Module, arguments: Any) -> None:
        try:
            taken = os.read(faults, 1)
        except BlockingIOError:
            return
        raise ValueError(f"a fault of the model {taken!r}")

    model.register_forward_pre_hook(fail)
    with forked(model, facts, {"tensor": 2}) as group:
        group.predict(asked[0])
        os.write(plant, b"xx" if all_fail else b"x")
        arrays = {name: array(value) for name, value in asked[0].items()}
        number = group.send(Inputs(1, asked[0]["tokens"].shape[1], arrays))
        told = [message for message in iter(group.hear, None) if not isinstance(message, Begun)] if not all_fail else []
        if all_fail:
            assert "a fault of the model" in group.answers([number])[number].why  # type: ignore[union-attr]
    assert told == []
    assert ("alone: ValueError: a fault of the model" in capfd.readouterr().out) is not all_fail
    os.close(faults)
    os.close(plant)


@pytest.mark.parametrize(
    ("mesh", "why"),
    [
        ({"data": 2}, "--replicas 2"),
        ({"context": 2}, "along pipe, tensor, expert so far"),
        ({"expert": 2, "tensor": 2}, "leave one of them out"),
        ({"tenosr": 2}, "tensor"),
        ({"pipe": 0}, "at least 1"),
        ({"pipe": 16, "tensor": 16}, "64 are the most"),
    ],
)
def test_a_mesh_that_is_not_served_is_refused_before_anything_starts(mesh: dict[str, int], why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        ServeOptions(mesh=mesh)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("case", "mesh", "why"),
    [
        (table, {"pipe": 9}, "too few"),
        (encoder, {"tensor": 3}, "heads"),
        (yours, {"tensor": 2}, "splits nothing"),
        (table, {"expert": 2}, "text from a mixture of experts"),
    ],
)
def test_a_model_that_has_too_little_to_split_is_refused_in_one_line(
    case: Callable[[], Case], mesh: dict[str, int], why: str
) -> None:
    model, facts, _ = prepared(case)
    with pytest.raises(UserError, match=why) as refused:
        made(deepcopy(model), facts, plan_of(mesh))
    assert "\n" not in str(refused.value)
