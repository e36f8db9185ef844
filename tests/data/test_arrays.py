"""NumPy and safetensors files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from shoal.data.arrays import read_arrays
from shoal.data.registry import open_data
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec

INPUT = np.random.default_rng(0).standard_normal((12, 3, 4)).astype(np.float32)
TARGET = np.arange(12) % 3


def write(folder: Path, kind: str) -> Path:
    if kind == "npy":
        (folder / "set").mkdir()
        np.save(folder / "set" / "input.npy", INPUT)
        np.save(folder / "set" / "target.npy", TARGET)
        return folder / "set"
    path = folder / f"set.{kind}"
    arrays = {"input": INPUT, "target": TARGET}
    np.savez(path, **arrays) if kind == "npz" else save_file(arrays, path)
    return path


def spec(path: Path, **options: object) -> DataSpec:
    return DataSpec(source="arrays", path=str(path), validation=0.0, options=options)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_all_formats_give_the_same_samples(tmp_path, kind):
    source = open_data(spec(write(tmp_path, kind)), 0).train
    batch = source.fetch(np.array([7, 2]), 0)
    assert torch.equal(batch["input"], torch.from_numpy(INPUT[[7, 2]]))
    assert batch["target"].tolist() == [1, 2]
    assert source.facts == {"shape": (3, 4), "classes": 3, "labels": ["0", "1", "2"]}


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_files_are_mapped_into_memory(tmp_path, kind):
    assert all(isinstance(array, np.memmap) for array in read_arrays(str(write(tmp_path, kind))).values())


def test_arrays_are_chosen_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", y=TARGET, x=INPUT, other=TARGET)
    batch = open_data(spec(tmp_path / "a.npz", input="x", target="y"), 0).train.fetch(np.arange(12), 0)
    assert torch.equal(batch["input"], torch.from_numpy(INPUT))
    assert batch["target"].tolist() == TARGET.tolist()


def test_numbers_as_targets_and_no_targets_at_all(tmp_path):
    np.savez(tmp_path / "a.npz", input=INPUT.reshape(12, 12), target=INPUT[:, 0])
    source = open_data(spec(tmp_path / "a.npz"), 0).train
    assert source.facts == {"features": 12, "outputs": 4}
    assert source.fetch(np.arange(2), 0)["target"].dtype == torch.float32
    np.save(tmp_path / "b.npy", INPUT)
    assert set(open_data(spec(tmp_path / "b.npy"), 0).train.fetch(np.arange(2), 0)) == {"input"}


def test_pixels_become_numbers_between_0_and_1(tmp_path):
    np.save(tmp_path / "b.npy", np.array([[0, 51, 255]], np.uint8).repeat(3, 0))
    batch = open_data(spec(tmp_path / "b.npy"), 0).train.fetch(np.arange(1), 0)
    assert torch.equal(batch["input"], torch.tensor([[0, 51, 255]]) / 255)


def test_nothing_is_ever_unpickled(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as arrays"):
        open_data(spec(tmp_path / "evil.npy"), 0)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_file_cut_short_is_named(tmp_path, kind):
    path = write(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"set\.{kind}' cannot be read as arrays") as caught:
        open_data(spec(path), 0)
    assert "\n" not in str(caught.value)


def test_mistakes_are_named(tmp_path):
    np.savez(tmp_path / "short.npz", input=INPUT, target=TARGET[:5])
    np.savez(tmp_path / "negative.npz", input=INPUT, target=TARGET - 1)
    np.savez(tmp_path / "words.npz", input=np.array(["a"] * 12))
    (tmp_path / "x.txt").write_text("hello")
    for wrong, message in [
        (spec(tmp_path / "none.npy"), "no .npy, .npz or .safetensors file"),
        (spec(tmp_path / "x.txt"), "is none of .npy, .npz and .safetensors"),
        (spec(tmp_path / "short.npz"), "12 samples in 'input', but 5 targets in 'target'"),
        (spec(tmp_path / "negative.npz"), "array 'target' holds -1: classes are numbered from 0"),
        (spec(tmp_path / "words.npz"), "not a set of samples"),
        (spec(tmp_path / "short.npz", input="inptu"), "unknown array 'inptu' in .* did you mean 'input'"),
    ]:
        with pytest.raises(UserError, match=message):
            open_data(wrong, 0)
