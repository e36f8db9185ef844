"""A disk that is full costs the new checkpoint and one line, never an old one, and leaves no partial file."""

import contextlib
import errno
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.train.checkpoint import Checkpoint, CheckpointError, listing, newest, save
from shoal.train.checkpoint_files import clear_leftovers
from shoal.train.snapshot import BackgroundWriter

SMALL = {"shard_bytes": 160, "chunk_bytes": 64}


def error_under_file_size_limit(size: int, act: Callable[[], object]) -> str:
    """What ``act`` raised in a process of its own: the limit also holds for a log that the tests' output goes to."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        told = "nothing was raised"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            act()
        except CheckpointError as error:
            told = str(error)
        except BaseException as error:
            told = f"another error: {error!r}"
        finally:
            os.write(writer, told.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return told


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if mount.returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200, 300])
def test_a_write_torn_by_a_file_size_limit_is_taken_back(tmp_path, checkpoint_of, same, size):
    save(checkpoint_of(1), tmp_path, **SMALL)
    told = error_under_file_size_limit(size, lambda: save(checkpoint_of(2), tmp_path, **SMALL))
    assert re.match(r"cannot write a checkpoint of step 2 in .*File too large", told)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert same(newest(tmp_path)[0], 1)


def test_a_full_disk_is_foretold_and_then_reported(tiny_disk, same, checkpoint_of):
    save(checkpoint_of(1), tiny_disk)
    warned: list[str] = []
    big = Checkpoint({"model/big": torch.zeros(100_000)}, {"step": 2})
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint of step 2 in .*No space left on device"):
        save(big, tiny_disk, warn=warned.append)
    [line] = warned
    assert re.match(r"a checkpoint needs 0\.4 MB and 0\.[23] MB are free in .*: make room there\.$", line)
    assert os.listdir(tiny_disk) == ["step-00000001"]
    save(checkpoint_of(3), tiny_disk, warn=warned.append)
    assert same(newest(tiny_disk)[0], 3)
    assert len(warned) == 1


def test_training_hears_of_a_full_disk_and_the_next_checkpoint_is_written(tiny_disk):
    with BackgroundWriter(tiny_disk) as writer:
        writer.submit({"model/big": torch.zeros(100_000)}, {"step": 1})
        writer.submit({"model/small": torch.ones(10)}, {"step": 2})
    failed, written = writer.poll()
    assert (failed.step, failed.path) == (1, None)
    assert failed.error == f"cannot write a checkpoint of step 1 in {tiny_disk}: No space left on device."
    assert len(failed.warnings) == 1
    assert (written.step, written.error, written.warnings) == (2, "", ())
    assert newest(tiny_disk)[0].step == 2


@pytest.mark.parametrize("effect", ["mkdir", "open", "write", "fsync", "rename"])
def test_an_error_at_any_call_of_any_kind_is_reported_and_cleaned_up(
    tmp_path, checkpoint_of, same, monkeypatch, effect
):
    for step in (1, 2):
        save(checkpoint_of(step), tmp_path, **SMALL)
    warned: list[str] = []
    refused: list[str] = []
    real = getattr(os, effect)
    for number in range(1, 1000):
        count = 0

        def fail(*args: Any, number: int = number, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, effect, fail)
            try:
                save(checkpoint_of(2), tmp_path, warn=warned.append, **SMALL)
            except CheckpointError as error:
                refused.append(str(error))
            else:
                if count < number:
                    break
        loaded, _, skipped = newest(tmp_path)
        assert skipped == []
        assert same(loaded, 2)
        clear_leftovers(tmp_path)  # as the next save does
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert refused
    assert all(line.endswith(": No space left on device.") for line in refused)
    assert all("has been replaced but cannot be removed: No space left on device." in line for line in warned)
    assert bool(warned) == (effect == "rename")


def test_a_folder_that_cannot_be_made_is_named(tmp_path, checkpoint_of):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint of step 1 in .*file/checkpoints"):
        save(checkpoint_of(1), tmp_path / "file" / "checkpoints")


def settled(writer: BackgroundWriter) -> list[Any]:
    """What a poll, and the write that it may have begun, come to."""
    told = writer.poll()
    writer._join()
    return told + writer.poll()


def test_what_found_no_room_is_written_by_itself_once_there_is(tiny_disk):
    ballast = tiny_disk / "ballast"
    with contextlib.suppress(OSError):
        ballast.write_bytes(bytes(300_000))
    with BackgroundWriter(tiny_disk, again_after_s=0.0) as writer:
        writer.submit({"model/weight": torch.ones(20_000)}, {"step": 1})
        writer._join()
        (failed,) = writer.poll()
        assert "No space left on device" in failed.error
        assert [settled(writer) for _ in range(3)] == [[], [], []], "it is told once"
        assert newest(tiny_disk)[0] is None
        ballast.unlink()
        (written,) = settled(writer)
        assert (written.step, written.error) == (1, "")
        assert newest(tiny_disk)[0].step == 1
        assert settled(writer) == []


def test_a_newer_state_takes_the_place_of_one_that_waits_for_room(tiny_disk):
    with BackgroundWriter(tiny_disk, again_after_s=0.0) as writer:
        writer.submit({"model/big": torch.zeros(100_000)}, {"step": 1})
        writer.submit({"model/small": torch.ones(10)}, {"step": 2})
        writer._join()
        assert [told.step for told in settled(writer)] == [1, 2]
    assert [told.step for told in writer.poll()] == []
    assert [listed.step for listed in listing(tiny_disk)] == [2]


@pytest.fixture
def mounted_read_only(tiny_disk: Path) -> Iterator[Callable[[bool], None]]:
    def mount(read_only: bool) -> None:
        how = f"remount,{'ro' if read_only else 'rw'}"
        subprocess.run(["mount", "-o", how, str(tiny_disk)], check=True)

    yield mount
    mount(False)


def test_a_read_only_mount_is_said_costs_nothing_and_is_written_to_when_it_may_be(
    tiny_disk, mounted_read_only, same, checkpoint_of
):
    save(checkpoint_of(1), tiny_disk)
    mounted_read_only(True)
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint of step 2 in .*: Read-only file system\.$"):
        save(checkpoint_of(2), tiny_disk)
    assert same(newest(tiny_disk)[0], 1)
    with BackgroundWriter(tiny_disk, keep=1, again_after_s=0.0) as writer:
        state = checkpoint_of(3)
        writer.submit(state.tensors, state.facts)
        writer._join()
        assert "Read-only file system" in writer.poll()[0].error
        mounted_read_only(False)
        (written,) = settled(writer)
        assert (written.step, written.error) == (3, "")
    assert same(newest(tiny_disk)[0], 3)


def test_an_error_that_does_not_pass_is_not_tried_again(tmp_path):
    with BackgroundWriter(tmp_path, again_after_s=0.0) as writer:
        writer.submit({"model/weight": torch.ones(3, dtype=torch.complex128)}, {"step": 1})
        writer._join()
        (failed,) = writer.poll()
        assert failed.error
        assert settled(writer) == []
