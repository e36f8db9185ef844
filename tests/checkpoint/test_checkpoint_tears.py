"""No torn checkpoint is ever loaded: each says which file is wrong, and the newest whole one is used instead."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.train import checkpoint, checkpoint_manifest
from shoal.train.checkpoint import CheckpointError, damage, listing, load, newest, read_manifest
from shoal.train.checkpoint_manifest import Manifest, StoredFile, StoredTensor, encode


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load(path)
    return str(refused.value)


def check_walk_back(folder: Path, torn: Path, file: Path, same: Callable[..., bool]) -> None:
    loaded, path, skipped = newest(folder)
    assert same(loaded, 1)
    assert path == folder / "step-00000001"
    [(where, why)] = skipped
    assert where == torn
    assert str(file) in why
    assert "\n" not in why
    assert damage(torn)


def test_the_untouched_checkpoint_loads(two, same):
    loaded, path, skipped = newest(two)
    assert same(loaded, 2)
    assert (path, skipped) == (two / "step-00000002", [])
    assert len(files_of(path)) >= 3
    assert damage(path) == []


def test_a_file_cut_short_at_any_byte_is_refused(two, same):
    torn = two / "step-00000002"
    for file in files_of(torn):
        whole = file.read_bytes()
        for length in range(len(whole) - 1, -1, -1):
            os.truncate(file, length)
            assert str(file) in refusal(torn)
        check_walk_back(two, torn, file, same)
        file.write_bytes(whole)
    assert same(load(torn), 2)


def test_a_flipped_bit_in_any_byte_of_any_file_is_refused(two, same):
    torn = two / "step-00000002"
    for file in files_of(torn):
        whole = file.read_bytes()
        with file.open("r+b", buffering=0) as writer:
            for place, byte in enumerate(whole):
                bit = 5 if chr(byte).isalpha() else place % 8  # 5: the case of a letter
                os.pwrite(writer.fileno(), bytes([byte ^ (1 << bit)]), place)
                assert str(file) in refusal(torn), f"byte {place}"
                os.pwrite(writer.fileno(), bytes([byte]), place)
    assert same(load(torn), 2)


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_span_overwritten_with_other_bytes_is_refused_and_walked_back_from(two, same, data):
    torn = two / "step-00000002"
    file = data.draw(st.sampled_from(files_of(torn)))
    whole = file.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    other = data.draw(st.binary(max_size=100))
    changed = whole[:start] + other + whole[start + len(other) :]
    if data.draw(st.booleans()):
        changed = whole[:start] + other + whole[start:]  # inserted
    if changed == whole:
        return
    file.write_bytes(changed)
    try:
        check_walk_back(two, torn, file, same)
    finally:
        file.write_bytes(whole)


def test_without_the_hash_check_the_flipped_bits_would_be_loaded(two, same, monkeypatch):
    """The planted fault of these tests: it is the chunk hashes that refuse, not some other accident."""
    torn = two / "step-00000002"
    file = torn / "state-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)

    def believe(path: Path, stored: StoredFile, chunk_bytes: int) -> list[int]:
        return []

    monkeypatch.setattr(checkpoint, "broken_chunks", believe)
    assert not same(load(torn), 2)
    monkeypatch.undo()
    assert str(file) in refusal(torn)


def test_a_missing_file_is_named(two, same):
    torn = two / "step-00000002"
    for file in files_of(torn):
        whole = file.read_bytes()
        file.unlink()
        check_walk_back(two, torn, file, same)
        file.write_bytes(whole)


def test_a_file_that_became_a_folder_or_a_pipe_is_named_and_not_waited_for(two, same):
    torn = two / "step-00000002"
    for file in files_of(torn):
        whole = file.read_bytes()
        file.unlink()
        file.mkdir()
        check_walk_back(two, torn, file, same)
        file.rmdir()
        os.mkfifo(file)
        check_walk_back(two, torn, file, same)
        file.unlink()
        file.write_bytes(whole)


def test_two_swapped_shards_are_refused_even_when_they_have_the_same_size(tmp_path, same):
    state = {"a": torch.zeros(4), "b": torch.ones(4)}
    path = checkpoint.save(checkpoint.Checkpoint(state, {"step": 2}), tmp_path, shard_bytes=16)
    first, second = path / "state-00000.safetensors", path / "state-00001.safetensors"
    assert first.stat().st_size == second.stat().st_size
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)
    assert "state-00000.safetensors: bytes 0 to" in refusal(path)


def test_shards_of_another_step_are_refused(two, same):
    torn = two / "step-00000002"
    for file in files_of(torn):
        whole = file.read_bytes()
        shutil.copyfile(two / "step-00000001" / file.name, file)
        if file.read_bytes() != whole:
            assert refusal(torn)
        file.write_bytes(whole)


def test_a_renamed_folder_does_not_pass_for_another_step(two, same):
    (two / "step-00000001").rename(two / "step-00000009")
    loaded, _, skipped = newest(two)
    assert same(loaded, 2)
    assert "manifest.json: is of step 1, its folder was renamed." in skipped[0][1]
    (two / "step-00000009").rename(two / "a copy")
    assert same(load(two / "a copy"), 1)


def test_an_empty_folder_is_not_a_checkpoint(two, same):
    (two / "step-00000003").mkdir()
    check = newest(two)
    assert same(check[0], 2)
    assert "manifest.json: cannot be read (No such file or directory)" in check[2][0][1]


def test_when_nothing_is_whole_every_one_is_listed_with_its_reason(two):
    for path in two.iterdir():
        (path / "manifest.json").write_bytes(b"{}")
    loaded, path, skipped = newest(two)
    assert (loaded, path) == (None, None)
    assert [where.name for where, _ in skipped] == ["step-00000002", "step-00000001"]
    assert all("is not a checkpoint's manifest" in why for _, why in skipped)


def test_damage_names_the_tensors_whose_bytes_are_hit(tmp_path):
    state = {"a": torch.zeros(64), "b": torch.ones(64), "c": torch.ones(64)}
    path = checkpoint.save(checkpoint.Checkpoint(state, {"step": 2}), tmp_path, chunk_bytes=64)
    stored = read_manifest(path).tensors["b"]
    file = path / stored.file
    raw = bytearray(file.read_bytes())
    raw[stored.start + 128] ^= 1
    raw[0] ^= 1
    file.write_bytes(raw)
    first, second = damage(path)
    assert first == f"{file}: bytes 0 to 63 (holds the file's header) are not those that were written."
    assert "(holds b)" in second
    assert [listed.problem for listed in listing(tmp_path)] == [""]
    assert [listed.problem for listed in listing(tmp_path, verify=True)] == [first]


def forge(path: Path, change: Callable[[Manifest], Manifest]) -> None:
    (path / "manifest.json").write_bytes(encode(change(read_manifest(path))))


def a_file(**fields: object) -> Callable[[Manifest], Manifest]:
    return lambda m: replace(m, files=(replace(m.files[0], **fields), *m.files[1:]))


def a_tensor(**fields: object) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        return replace(manifest, tensors={**manifest.tensors, "t": replace(whole_tensor(manifest), **fields)})

    return change


def whole_tensor(manifest: Manifest) -> StoredTensor:
    return next(tensor for tensor in manifest.tensors.values() if tensor.dtype == "F32" and tensor.shape)


FORGERIES = {
    "no step": (lambda m: replace(m, facts={}), "has step None among its facts"),
    "step as text": (lambda m: replace(m, facts={"step": "2"}), "has step '2' among its facts"),
    "file in the parent": (a_file(name="../step-00000001/state-00000.safetensors"), "file names must be plain"),
    "absolute file": (a_file(name="/etc/passwd"), "file names must be plain"),
    "hidden file": (a_file(name=".hidden"), "file names must be plain"),
    "parent as file": (a_file(name=".."), "file names must be plain"),
    "no name": (a_file(name=""), "file names must be plain"),
    "name with a null byte": (a_file(name="a\0b"), "file names must be plain"),
    "same file twice": (lambda m: replace(m, files=(m.files[0], *m.files)), "file names must be plain"),
    "fewer hashes than chunks": (a_file(sha256=()), "0 chunk hashes"),
    "negative size": (a_file(bytes=-5), "of -5 bytes"),
    "chunks of no bytes": (lambda m: replace(m, chunk_bytes=0), "chunk_bytes 0"),
    "size as text": (a_file(bytes="5"), "must be a whole number"),
    "tensor past the end": (a_tensor(start=1 << 40, end=(1 << 40) + 48), "it cannot"),
    "tensor before the start": (a_tensor(start=-48, end=0), "it cannot"),
    "tensor of another size": (a_tensor(shape=(1 << 62, 8)), "it cannot"),
    "tensor of negative shape": (a_tensor(shape=(-3, -4)), "it cannot"),
    "tensor in an unknown file": (a_tensor(file="state-99999.safetensors"), "it cannot"),
    "tensor of an unknown dtype": (a_tensor(dtype="F12"), "unknown dtype 'F12'"),
    "tensor off its alignment": (a_tensor(start=1, end=49), "it cannot"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_with_a_right_hash_is_refused(two, name):
    change, wrong = FORGERIES[name]
    forge(two / "step-00000002", change)
    assert re.search(r"manifest\.json: .*" + re.escape(wrong), refusal(two / "step-00000002"))


def test_forging_nothing_still_loads(two, same):
    forge(two / "step-00000002", lambda manifest: manifest)
    assert same(load(two / "step-00000002"), 2)


@pytest.mark.parametrize(
    ("raw", "wrong"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a checkpoint's manifest"),
        (
            json.dumps({"format": "shoal checkpoint", "schema": 2}).encode(),
            "has schema 2, this version of shoal reads 1",
        ),
        (json.dumps({"format": "shoal checkpoint", "schema": 1}).encode(), "has no proper manifest_sha256"),
        (
            json.dumps({"format": "shoal checkpoint", "schema": 1, "manifest_sha256": "0" * 64}).encode(),
            "does not match its own manifest_sha256",
        ),
    ],
)
def test_a_manifest_that_is_none_says_so(two, raw, wrong):
    (two / "step-00000002" / "manifest.json").write_bytes(raw)
    assert wrong in refusal(two / "step-00000002")


def test_a_file_or_folder_that_may_not_be_read_is_named(two, same, monkeypatch):
    torn = two / "step-00000002"

    def forbid(pattern: str) -> None:
        for method in ("open", "iterdir"):
            real = getattr(Path, method)

            def checked(self: Path, *args: object, real: Any = real, **named: object) -> Any:
                if self.match(pattern):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                return real(self, *args, **named)

            monkeypatch.setattr(Path, method, checked)

    for file in files_of(torn):
        forbid(f"{torn.name}/{file.name}")
        check_walk_back(two, torn, file, same)
        assert f"{file}: cannot be read (Permission denied)" in refusal(torn)
        monkeypatch.undo()
    forbid(two.name)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        newest(two)


def test_an_endless_manifest_is_neither_read_nor_written(two, checkpoint_of, monkeypatch):
    monkeypatch.setattr(checkpoint_manifest, "LIMIT_BYTES", 1000)
    assert "is larger than 1000 bytes" in refusal(two / "step-00000002")
    with pytest.raises(CheckpointError, match="the limit is 1000"):
        checkpoint.save(checkpoint_of(3), two)
    assert len(os.listdir(two)) == 2
