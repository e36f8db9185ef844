"""What is saved is what is loaded, by Shoal and by the safetensors library."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from shoal.train.checkpoint import Checkpoint, CheckpointError, best, listing, load, newest, prune, save
from shoal.train.checkpoint_layout import DTYPES


@pytest.mark.parametrize("sizes", [{}, {"shard_bytes": 1, "chunk_bytes": 1}, {"shard_bytes": 100, "chunk_bytes": 64}])
def test_a_loaded_checkpoint_has_the_tensors_and_facts_that_were_saved(tmp_path, checkpoint_of, same, sizes):
    path = save(checkpoint_of(120), tmp_path / "checkpoints", **sizes)
    assert path == tmp_path / "checkpoints" / "step-00000120"
    assert same(load(path), 120)


@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 20])
def test_the_safetensors_library_reads_every_shard(tmp_path, checkpoint_of, shard_bytes):
    path = save(checkpoint_of(3), tmp_path, shard_bytes=shard_bytes)
    read = {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
    wanted = checkpoint_of(3).tensors
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) and read[name].dtype == wanted[name].dtype for name in wanted)


@pytest.mark.parametrize(
    "dtype",
    sorted(DTYPES.values(), key=str),
    ids=str,
)
def test_every_dtype_comes_back_beside_others_of_any_alignment(tmp_path, dtype):
    odd = torch.tensor([1, 2, 3], dtype=torch.uint8)
    value = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    path = save(Checkpoint({"a": odd, "b": value, "c": odd}, {"step": 0}), tmp_path)
    loaded = load(path).tensors
    assert loaded["b"].dtype == dtype
    assert torch.equal(loaded["b"].view(torch.uint8), value.view(torch.uint8))
    in_library = load_file(path / "state-00000.safetensors")
    assert torch.equal(in_library["b"].view(torch.uint8), value.view(torch.uint8))


def test_no_shard_is_larger_than_asked_unless_one_tensor_is(tmp_path):
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate([10, 10, 10, 100, 5, 20])}
    path = save(Checkpoint(tensors, {"step": 0}), tmp_path, shard_bytes=100)
    shards = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    assert [sorted(shard) for shard in shards] == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]


def test_a_checkpoint_without_tensors_is_whole(tmp_path):
    assert load(save(Checkpoint({}, {"step": 4}), tmp_path)).facts == {"step": 4}


def test_the_manifest_hash_can_be_recomputed_from_the_bytes_alone(two):
    import hashlib

    raw = (two / "step-00000002" / "manifest.json").read_bytes()
    said = json.loads(raw)["manifest_sha256"].encode()
    assert hashlib.sha256(raw.replace(said, b"0" * 64)).hexdigest().encode() == said


@pytest.mark.parametrize(
    ("facts", "wrong"),
    [
        ({}, "facts['step'] must be a whole number"),
        ({"step": -1}, "facts['step'] must be a whole number"),
        ({"step": True}, "facts['step'] must be a whole number"),
        ({"step": 1, "loss": {"train": float("nan")}}, "facts.loss.train is nan"),
        ({"step": 1, "betas": [0.9, torch.tensor(1.0)]}, "facts.betas[1] is tensor(1.)"),
        ({"step": 1, "groups": {0: "a"}}, "the keys of facts.groups must be text, got 0"),
    ],
)
def test_facts_that_json_would_change_are_refused_before_anything_is_written(tmp_path, facts, wrong):
    with pytest.raises(CheckpointError) as refusal:
        save(Checkpoint({"a": torch.ones(1)}, facts), tmp_path)
    assert wrong in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "wrong"),
    [
        ({"a": torch.ones(2, dtype=torch.complex128)}, "'a' has dtype torch.complex128"),
        ({"__metadata__": torch.ones(2)}, "'__metadata__' is no tensor name"),
    ],
)
def test_tensors_that_the_format_cannot_hold_are_refused(tmp_path, tensors, wrong):
    with pytest.raises(CheckpointError) as refusal:
        save(Checkpoint(tensors, {"step": 0}), tmp_path)
    assert wrong in str(refusal.value)


def test_a_sparse_tensor_is_refused_and_leaves_nothing_behind(tmp_path):
    from shoal.errors import ShoalError

    with pytest.raises(ShoalError, match="make it dense first"):
        save(Checkpoint({"a": torch.eye(3).to_sparse()}, {"step": 0}), tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_newest_is_the_one_with_the_highest_step(tmp_path, checkpoint_of, same):
    for step in (99_999_999, 100_000_000, 7):  # names of different lengths
        save(checkpoint_of(step), tmp_path)
    loaded, path, skipped = newest(tmp_path)
    assert same(loaded, 100_000_000)
    assert (path, skipped) == (tmp_path / "step-100000000", [])


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_folder_without_checkpoints_has_no_newest(tmp_path, folder):
    assert newest(tmp_path / folder) == (None, None, [])
    assert listing(tmp_path / folder) == []


def test_the_best_is_the_newest_that_was_marked(tmp_path, checkpoint_of, same):
    for step in range(5):
        save(checkpoint_of(step), tmp_path, best=step in (1, 3))
    assert same(best(tmp_path)[0], 3)
    assert [listed.step for listed in listing(tmp_path) if listed.best] == [3, 1]


def test_saving_a_step_again_replaces_it(tmp_path, checkpoint_of):
    first = save(checkpoint_of(5), tmp_path)
    again = Checkpoint({"model/x": torch.ones(1)}, {"step": 5})
    second = save(again, tmp_path)
    assert first != second
    assert not first.exists()
    assert newest(tmp_path)[1] == second
    assert [listed.path for listed in listing(tmp_path)] == [second]


def test_saving_the_step_of_the_best_again_keeps_the_best(tmp_path, checkpoint_of):
    first = save(checkpoint_of(5), tmp_path, best=True)
    second = save(checkpoint_of(5), tmp_path)
    assert (best(tmp_path)[1], newest(tmp_path)[1]) == (first, second)
    third = save(checkpoint_of(5), tmp_path, best=True)
    assert [listed.path for listed in listing(tmp_path)] == [third]


def test_pruning_keeps_the_newest_ones_and_the_best(tmp_path, checkpoint_of):
    for step in range(6):
        save(checkpoint_of(step), tmp_path, best=step in (0, 2))
    gone = prune(tmp_path, keep=2)
    assert [listed.step for listed in listing(tmp_path, verify=True)] == [5, 4, 2]
    assert sorted(path.name for path in gone) == ["step-00000000", "step-00000001", "step-00000003"]
    assert len(os.listdir(tmp_path)) == 3
    assert prune(tmp_path, keep=2) == []


def test_pruning_never_removes_the_newest_one_that_is_whole_to_the_last_byte(tmp_path, checkpoint_of, same):
    for step in range(5):
        save(checkpoint_of(step), tmp_path)
    for step in (3, 4):  # of the right size, hence whole at a glance
        file = tmp_path / f"step-0000000{step}" / "state-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    prune(tmp_path, keep=1)
    assert same(newest(tmp_path)[0], 2)
    assert [listed.step for listed in listing(tmp_path)] == [4, 3, 2]


def test_pruning_removes_nothing_when_no_checkpoint_is_whole(two):
    for path in two.iterdir():
        (path / "manifest.json").unlink()
    assert prune(two, keep=1) == []
    assert len(listing(two)) == 2
