"""Data sets from Python, as PyTorch and Hugging Face make them, and the user's own pre-processing."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from shoal.data.dataset import DatasetSource
from shoal.data.loading import Prefetcher
from shoal.data.registry import open_data
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec

MODULE = """
import torch
from torch.utils.data import TensorDataset

def make(count=10):
    return TensorDataset(torch.arange(count).float()[:, None], torch.arange(count) % 2)

def parts():
    return {"train": make(8), "test": make(3)}

def wrong():
    return {"trian": make(3)}

def double(batch):
    return {**batch, "input": torch.cat([batch["input"], 2 * batch["input"]], 1)}

VALUE = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_data_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


class Noisy(Dataset):
    """Draws from all three global generators, as random transforms do."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.cat([torch.randn(2), torch.tensor([np.random.rand(), random.random()])]), i


class Rows:
    """As Hugging Face's ``datasets``: rows are mappings of plain values, and a whole batch can be asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> dict:
        return {"tokens": [i, i + 1, i + 2], "target": i % 2}

    def __getitems__(self, ids: list[int]) -> list[dict]:
        self.asked.append(ids)
        return [self[i] for i in ids]


def test_pairs_become_input_and_target():
    source = DatasetSource(TensorDataset(torch.randn(7, 3, 4), torch.arange(7)))
    batch = source.fetch(np.array([4, 1]), 0)
    assert batch["target"].tolist() == [4, 1]
    assert batch["input"].shape == (2, 3, 4)
    assert source.facts == {"shape": (3, 4)}
    assert not source.draws


def test_mappings_keep_their_names_and_are_fetched_as_a_batch():
    rows = Rows()
    source = DatasetSource(rows)
    rows.asked.clear()
    assert source.fetch(np.array([3, 0]), 0)["tokens"].tolist() == [[3, 4, 5], [0, 1, 2]]
    assert rows.asked == [[3, 0]]
    assert source.facts["context"] == 3


def test_columns_are_chosen_and_renamed():
    rows = [{"image": np.full((2, 2), i), "label": i % 2, "title": "words"} for i in range(4)]
    source = DatasetSource(rows, columns={"input": "image", "target": "label"})
    batch = source.fetch(np.array([3, 0]), 0)
    assert {name: tensor.shape for name, tensor in batch.items()} == {"input": (2, 2, 2), "target": (2,)}
    assert batch["target"].tolist() == [1, 0]
    with pytest.raises(UserError, match=r"unknown column 'lable' .* did you mean 'label'"):
        DatasetSource(rows, columns={"target": "lable"})


def test_a_collate_of_the_users_own_replaces_ours():
    source = DatasetSource([1, 2, 3], collate=lambda samples: {"tokens": torch.tensor(samples)})
    assert source.fetch(np.array([2, 0]), 0)["tokens"].tolist() == [3, 1]


def test_a_list_of_numbers_is_a_data_set():
    source = DatasetSource([1.5, 2.5])
    assert source.fetch(np.array([1]), 0)["input"].tolist() == [2.5]


def test_random_transforms_become_a_function_of_seed_epoch_and_id():
    source = DatasetSource(Noisy(), seed=1)
    assert source.draws
    first = source.fetch(np.array([2, 4]), 0)["input"]
    torch.manual_seed(99)
    again = source.fetch(np.array([4, 2]), 0)["input"]
    assert torch.equal(first, again.flip(0))
    assert not torch.equal(first, source.fetch(np.array([2, 4]), 1)["input"])
    assert not torch.equal(first, DatasetSource(Noisy(), seed=2).fetch(np.array([2, 4]), 0)["input"])


def test_random_transforms_leave_the_training_runs_generators_alone():
    source = DatasetSource(Noisy())
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    source.fetch(np.arange(6), 0)
    DatasetSource(Noisy())
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]


def test_random_transforms_give_the_same_bits_with_and_without_prefetch():
    work = [(i, np.array([i, 5 - i]), 0) for i in range(6)]
    runs = []
    for ahead, threads in ((0, 0), (3, 2)):
        with Prefetcher(DatasetSource(Noisy()), work, ahead, threads) as batches:
            runs.append(torch.stack([batch["input"] for _, batch in batches]))
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (type("Stream", (IterableDataset,), {"__iter__": lambda self: iter([1])})(), "is not a map-style data set"),
        ([], "has no samples"),
        (["words"], "cannot be stacked .* give a collate"),
        ([(1, 2, 3)], "a tuple of 3"),
        ([(object(), 1)], "'input' cannot be stacked"),
    ],
)
def test_a_data_set_that_cannot_be_used_says_why(dataset, message):
    with pytest.raises(UserError, match=message):
        DatasetSource(dataset)


def test_samples_of_different_shapes_are_refused_when_they_meet():
    source = DatasetSource([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(UserError, match="cannot be stacked"):
        source.fetch(np.array([0, 1]), 0)


def test_a_recipe_names_a_factory(module):
    options = {"factory": f"{module}:make", "arguments": {"count": 20}, "facts": {"classes": 2}}
    splits = open_data(DataSpec(source="python", validation=0.25, options=options), 0)
    assert (len(splits.train), len(splits.validation), splits.test) == (15, 5, None)
    assert splits.train.facts == {"features": 1, "classes": 2}


def test_a_factory_may_return_its_own_splits(module):
    splits = open_data(DataSpec(source="python", validation=0.25, options={"factory": f"{module}:parts"}), 0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 2, 3)


def test_preprocessing_changes_every_batch_and_the_facts(module):
    options = {"factory": f"{module}:make", "preprocess": f"{module}:double"}
    splits = open_data(DataSpec(source="python", validation=0.5, options=options), 0)
    plain = open_data(DataSpec(source="python", validation=0.5, options={"factory": f"{module}:make"}), 0)
    before, after = (one.validation.fetch(np.arange(3), 0)["input"] for one in (plain, splits))
    assert torch.equal(after, torch.cat([before, 2 * before], 1))
    assert splits.train.facts["features"] == 2
    assert splits.train.fingerprint != plain.train.fingerprint


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("", "needs factory = 'module:function'"),
        ("make", "must be written 'module:function'"),
        ("no_such_module:make", "cannot import 'no_such_module'"),
        ("{module}:mke", "unknown function 'mke' in .* did you mean 'make'"),
        ("{module}:VALUE", "VALUE is a int, not a function"),
        ("{module}:wrong", "unknown split 'trian' in .* did you mean 'train'"),
    ],
)
def test_a_wrong_factory_is_named(module, factory, message):
    with pytest.raises(UserError, match=message):
        open_data(DataSpec(source="python", options={"factory": factory.format(module=module)}), 0)
