"""Folders of images."""

import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.data.registry import open_data
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(1)
    for label in ("cat", "dog"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / label / f"{i}.png")
    return tmp_path / "train"


def spec(path: Path, **options: object) -> DataSpec:
    parts = {name: options.pop(name) for name in ("validation", "test", "test_path") if name in options}
    return DataSpec(source="images", path=str(path), options={"size": 8, **options}, **parts)


def test_the_folder_is_the_class(folder):
    source = open_data(spec(folder, validation=0.0), 0).train
    assert source.facts == {"shape": (3, 8, 8), "classes": 2, "labels": ["cat", "dog"]}
    batch = source.fetch(np.arange(12), 0)
    assert batch["target"].tolist() == [0] * 6 + [1] * 6
    assert batch["input"].shape == (12, 3, 8, 8)


def test_pixels_are_normalised_channel_by_channel(folder):
    source = open_data(spec(folder, validation=0.0, size=[20, 30], mean=[0.1, 0.2, 0.3], std=[1, 2, 4]), 0).train
    raw = np.asarray(Image.open(folder / "dog" / "2.png")).transpose(2, 0, 1) / 255.0
    expected = (raw - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape([1, 2, 4], (3, 1, 1))
    assert torch.equal(source.fetch(np.array([8]), 0)["input"][0], torch.from_numpy(expected.astype(np.float32)))


def test_grey_images_have_one_channel(folder):
    assert open_data(spec(folder, channels=1), 0).train.fetch(np.arange(2), 0)["input"].shape == (2, 1, 8, 8)


def test_a_test_folder_has_the_training_folders_classes(folder, tmp_path):
    (tmp_path / "apart" / "dog").mkdir(parents=True)
    (folder / "dog" / "5.png").rename(tmp_path / "apart" / "dog" / "5.png")
    splits = open_data(spec(folder, test_path=str(tmp_path / "apart")), 0)
    assert splits.test.fetch(np.arange(1), 0)["target"].tolist() == [1]
    (tmp_path / "apart" / "dgo").mkdir()
    with pytest.raises(UserError, match=r"unknown class folder 'dgo' in .*: did you mean 'dog'"):
        open_data(spec(folder, test_path=str(tmp_path / "apart")), 0)


def test_an_image_that_cannot_be_decoded_is_named(folder):
    path = folder / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:300])
    source = open_data(spec(folder, validation=0.0), 0).train
    with pytest.raises(UserError, match=r"cannot decode image '.*cat/3\.png'"):
        source.fetch(np.arange(12), 0)


def test_mistakes_are_named(folder, tmp_path):
    (tmp_path / "flat").mkdir()
    for wrong, message in [
        (spec(tmp_path / "nowhere"), "no folder"),
        (spec(tmp_path / "flat"), "no images in the sub-folders"),
        (spec(folder, channels=2), "unknown value for channels '2'"),
        (spec(folder, size=0), "size must be at least 1"),
        (spec(folder, mean=[0.1, 0.2], std=[1, 1]), "one for each of the 3 channels"),
        (spec(folder, fliip=True), "did you mean 'flip'"),
    ]:
        with pytest.raises(UserError, match=message):
            open_data(wrong, 0)


def test_without_pillow_one_line_says_what_to_install(folder, monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"reading images needs pillow: pip install 'shoal\[images\]'"):
        open_data(spec(folder), 0)
