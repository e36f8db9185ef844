"""IDX files: the real MNIST, and every way in which a file can be damaged."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import idx_bytes

from shoal.data.idx import read_idx
from shoal.data.registry import open_data
from shoal.data.source import Splits
from shoal.errors import UserError
from shoal.recipe.recipe import DataSpec


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name, count in (("train", 40), ("t10k", 10)):
        images = generator.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes((np.arange(count) % 5).astype(np.uint8)))
    return tmp_path


def spec(path: Path, **options: object) -> DataSpec:
    parts = {name: options.pop(name) for name in ("validation", "test", "test_path") if name in options}
    return DataSpec(source="idx", path=str(path), options=options, **parts)


def inputs(splits: Splits, part: str = "train", epoch: int = 0) -> torch.Tensor:
    source = getattr(splits, part)
    return source.fetch(np.arange(len(source)), epoch)["input"]


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("packed", [False, True])
def test_arrays_of_every_type_are_read_back_plain_or_gzipped(tmp_path, kind, packed):
    array = np.arange(-12, 12).astype(kind).reshape(2, 3, 4)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    assert np.array_equal(read_idx(path), array)


def test_real_mnist_is_normalised_by_its_training_images(shared_data):
    splits = open_data(spec(shared_data / "mnist", validation=0.1), 0)
    assert [len(getattr(splits, part)) for part in ("train", "validation", "test")] == [54000, 6000, 10000]
    assert splits.train.facts["shape"] == (1, 28, 28)
    assert splits.train.facts["classes"] == 10
    batch = splits.train.fetch(np.arange(0, 54000, 9), 0)
    assert batch["input"].dtype == torch.float32
    assert batch["target"].dtype == torch.int64
    assert abs(batch["input"].mean().item()) < 0.01  # a ninth of the images: the mean is near 0, not at it
    assert abs(batch["input"].std().item() - 1) < 0.01
    assert torch.bincount(splits.test.fetch(np.arange(10000), 0)["target"]).tolist()[:3] == [980, 1135, 1032]


def test_training_and_validation_share_no_sample_and_lose_none(digits):
    splits = open_data(spec(digits, validation=0.2, test=0.1), 3)
    rows = [row.numpy().tobytes() for part in ("train", "validation", "test") for row in inputs(splits, part)]
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [28, 8, 4]
    assert len(set(rows)) == 40


def test_the_seed_chooses_what_is_held_out(digits):
    prints = {open_data(spec(digits, validation=0.2), seed).train.fingerprint for seed in (0, 0, 1)}
    assert len(prints) == 2


def test_given_statistics_replace_those_of_the_training_set(digits):
    raw = read_idx(digits / "train-images-idx3-ubyte.gz")[:, None].astype(np.float64) / 255
    given = inputs(open_data(spec(digits, validation=0.0, mean=0.25, std=0.5), 0))
    assert torch.equal(given, torch.from_numpy(((raw - 0.25) / 0.5).astype(np.float32)))


def test_random_changes_are_a_function_of_seed_epoch_and_id(digits):
    options = {"validation": 0.2, "flip": True, "crop": 2}
    first = inputs(open_data(spec(digits, **options), 0))
    assert torch.equal(first, inputs(open_data(spec(digits, **options), 0)))
    source = open_data(spec(digits, **options), 0).train
    backwards = source.fetch(np.arange(len(source))[::-1], 0)["input"]
    assert torch.equal(backwards.flip(0), first)
    assert not torch.equal(first, inputs(open_data(spec(digits, **options), 0), epoch=1))
    golden = hashlib.sha256(source.fetch(np.arange(8), 5)["input"].numpy().astype("<f4").tobytes()).hexdigest()
    assert golden[:16] == "1545e0a8fea77935"


def test_about_half_of_the_images_are_mirrored_and_all_moves_occur(digits):
    plain = inputs(open_data(spec(digits, validation=0.0), 0))
    mirrored = inputs(open_data(spec(digits, validation=0.0, flip=True), 0))
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(plain, mirrored, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    assert all(a != b for a, b in zip(flipped, same, strict=True))
    assert 8 < sum(flipped) < 32


def test_held_out_images_are_never_changed_at_random(digits):
    plain = open_data(spec(digits, validation=0.2), 0)
    changed = open_data(spec(digits, validation=0.2, flip=True, crop=3), 0)
    assert torch.equal(inputs(plain, "validation"), inputs(changed, "validation"))
    assert torch.equal(inputs(plain, "test"), inputs(changed, "test"))
    assert not torch.equal(inputs(plain), inputs(changed))


def test_two_samples_with_their_batch_or_alone_are_the_same_bits(digits):
    source = open_data(spec(digits, flip=True, crop=1), 0).train
    both = source.fetch(np.array([3, 9]), 1)["input"]
    assert torch.equal(both[1:], source.fetch(np.array([9]), 1)["input"])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda raw: raw[:-100], "damaged gzip file"),
        ("train-images-idx3-ubyte.gz", lambda raw: raw[:200] + b"\xff" * 50 + raw[250:], "damaged gzip file"),
        ("train-images-idx3-ubyte.gz", lambda raw: b"<html>not found", "is not an IDX file: it starts with 3c68746d"),
        ("train-images-idx3-ubyte.gz", lambda raw: b"", "is not an IDX file: it starts with nothing"),
        ("train-labels-idx1-ubyte", lambda raw: raw[:-3], "is cut short: 45 bytes, but its header says 40 values, 48"),
        ("train-labels-idx1-ubyte", lambda raw: raw + b"x", "is too long"),
        ("train-labels-idx1-ubyte", lambda raw: raw[:6], "is cut short"),
        ("train-labels-idx1-ubyte", lambda raw: idx_bytes(np.zeros(39, np.uint8)), "40 images, but .* 39 labels"),
        ("train-labels-idx1-ubyte", lambda raw: idx_bytes(np.zeros(40, np.int32)), "not 8-bit labels"),
        ("t10k-labels-idx1-ubyte", lambda raw: idx_bytes(np.full(10, 9, np.uint8)), "other shapes or labels"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(digits, name, damage, message):
    path = digits / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        open_data(spec(digits), 0)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(digits, tmp_path):
    (digits / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no file train-labels-idx1-ubyte or"):
        open_data(spec(digits), 0)
    with pytest.raises(UserError, match="no folder"):
        open_data(spec(tmp_path / "nowhere"), 0)
    with pytest.raises(UserError, match="give both mean and std"):
        open_data(spec(digits, mean=0.5), 0)


def test_a_separate_test_folder_is_used(digits, tmp_path_factory):
    apart = tmp_path_factory.mktemp("apart")
    for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte"):
        (digits / f"t10k-{name}").rename(apart / f"t10k-{name}")
    assert open_data(spec(digits), 0).test is None
    assert len(open_data(spec(digits, test_path=str(apart)), 0).test) == 10
