"""A writer that is killed, at any system call, never leaves a bad newest checkpoint and never loses an older one."""

import os
import select
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.train import checkpoint, checkpoint_files
from shoal.train.checkpoint import Checkpoint, best, listing, newest, prune, save
from shoal.train.snapshot import BackgroundWriter

EFFECTS = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")
SMALL = {"shard_bytes": 8, "chunk_bytes": 128}  # two shards of several chunks: every kind of effect, and few of each


def made_at(step: int) -> Checkpoint:
    return Checkpoint({"a": torch.full((2,), float(step)), "b": torch.full((2,), float(step))}, {"step": step})


def is_from(loaded: Checkpoint | None, step: int) -> bool:
    return (
        loaded is not None
        and loaded.facts == {"step": step}
        and set(loaded.tensors) == {"a", "b"}
        and all(torch.equal(tensor, torch.full((2,), float(step))) for tensor in loaded.tensors.values())
    )


def begun(work: Callable[[], None]) -> int:
    """Run in a forked child; its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: this process has idle threads
        pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def forked(work: Callable[[], None]) -> int:
    """Run in a forked child; its wait status."""
    return os.waitpid(begun(work), 0)[1]


def effects_of(work: Callable[[], None]) -> list[str]:
    """Names of the effects on files that the work has, in order."""
    names: list[str] = []

    def wrap(effect: Callable[..., Any], name: str) -> Callable[..., Any]:
        def noted(*args: Any, **named: Any) -> Any:
            names.append(name)
            return effect(*args, **named)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in EFFECTS:
            patch.setattr(os, name, wrap(getattr(os, name), name))
        work()
    return names


def die_at(number: int, torn: bool) -> None:
    """Let this process kill itself at its ``number``-th effect on files; ``torn``: after half of that write."""
    count = 0

    def wrap(effect: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                if torn:
                    effect(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return effect(*args, **named)

        return counted

    for name in EFFECTS:
        setattr(os, name, wrap(getattr(os, name)))


def killed_everywhere(work: Callable[[], None], prepare: Callable[[], None], check: Callable[[], None]) -> list[str]:
    """Prepare, kill the work at one of its effects, check: for each effect in turn. The names of the effects."""
    prepare()
    effects = effects_of(work)
    for number, name in enumerate(effects, 1):
        for torn in (False, True) if name == "write" else (False,):
            prepare()

            def doomed(number: int = number, torn: bool = torn) -> None:
                die_at(number, torn)
                work()

            status = forked(doomed)
            assert os.WIFSIGNALED(status), "the child failed before it was killed"
            assert os.WTERMSIG(status) == signal.SIGKILL
            check()
    return effects


def empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def test_a_kill_at_any_effect_of_a_save_leaves_the_old_newest_or_the_new_one(tmp_path):
    folder = tmp_path / "checkpoints"
    seen: set[int] = set()

    def prepare() -> None:
        empty(folder)
        save(made_at(1), folder, **SMALL)

    def check() -> None:
        loaded, _, skipped = newest(folder)
        assert skipped == []
        assert is_from(loaded, loaded.step)
        seen.add(loaded.step)
        save(made_at(3), folder, **SMALL)
        assert is_from(newest(folder)[0], 3)
        assert not [name for name in os.listdir(folder) if name.startswith(".")], "a dead writer's files are left"

    effects = killed_everywhere(lambda: save(made_at(2), folder, **SMALL), prepare, check)
    assert set(EFFECTS) - {"unlink", "rmdir"} <= set(effects)
    assert seen == {1, 2}


def test_a_kill_while_a_step_is_replaced_never_leaves_that_step_broken(tmp_path):
    folder = tmp_path / "checkpoints"

    def prepare() -> None:
        empty(folder)
        save(made_at(1), folder, **SMALL)
        save(made_at(2), folder, best=True, **SMALL)

    def check() -> None:
        assert is_from(newest(folder)[0], 2)
        assert is_from(best(folder)[0], 2)
        assert newest(folder)[2] == []

    effects = killed_everywhere(lambda: save(made_at(2), folder, best=True, **SMALL), prepare, check)
    assert effects.count("rename") == 2


def test_a_kill_at_any_effect_of_a_prune_leaves_only_whole_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"

    def prepare() -> None:
        empty(folder)
        for step in range(4):
            save(made_at(step), folder, best=step == 1, **SMALL)

    def check() -> None:
        assert is_from(newest(folder)[0], 3)
        assert is_from(best(folder)[0], 1)
        assert {listed.problem for listed in listing(folder, verify=True)} == {""}

    assert killed_everywhere(lambda: prune(folder, keep=1), prepare, check).count("rename") == 2


def test_a_writer_without_the_temporary_folder_would_leave_a_bad_newest(tmp_path, monkeypatch):
    """The planted fault: written in place, the very same kills do leave a torn checkpoint, and loading says so."""
    folder = tmp_path / "checkpoints"
    torn: list[str] = []

    def prepare() -> None:
        empty(folder)
        save(made_at(1), folder, **SMALL)

    def check() -> None:
        loaded, _, skipped = newest(folder)
        assert is_from(loaded, loaded.step)
        torn.extend(why for _, why in skipped)

    monkeypatch.setattr(checkpoint, "temporary", lambda folder, verb, name: folder / name)
    monkeypatch.setattr(checkpoint, "_rename_to_free_name", lambda hidden, folder, step: hidden)
    killed_everywhere(lambda: save(made_at(2), folder, **SMALL), prepare, check)
    assert len(torn) > 10


def save_for_ever(folder: Path, told: int) -> None:
    """A byte after each submit."""
    state = {f"model/{i}": torch.zeros(2000) for i in range(8)}
    with BackgroundWriter(folder, like=state, keep=2, shard_bytes=20_000, chunk_bytes=4096) as writer:
        for step in range(100_000):
            for tensor in state.values():
                tensor.fill_(step)
            writer.submit(state, {"step": step})
            os.write(told, b".")


@pytest.mark.parametrize("saves", [1, 5, 12])
def test_kill_9_of_a_training_process_leaves_a_whole_newest_checkpoint(tmp_path, saves):
    heard, told = os.pipe()

    def train() -> None:
        os.close(heard)
        save_for_ever(tmp_path, told)

    pid = begun(train)
    os.close(told)
    with os.fdopen(heard, "rb", buffering=0) as progress:
        for _ in range(saves + 1):  # the submit after a save has waited for it
            assert progress.read(1)
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    loaded, _, skipped = newest(tmp_path)
    assert skipped == []
    assert loaded.step >= saves - 1
    assert all((tensor == loaded.step).all() for tensor in loaded.tensors.values())


def test_leftovers_of_a_live_writer_are_left_alone(tmp_path):
    """A child stops in the middle of its save; another process saves meanwhile; then the child goes on and ends."""
    stopped, go = os.pipe(), os.pipe()

    def slow() -> None:
        real = os.rename

        def wait_then_rename(source: Any, target: Any) -> None:
            os.write(stopped[1], b".")
            os.read(go[0], 1)
            real(source, target)

        os.rename = wait_then_rename
        save(made_at(2), tmp_path, **SMALL)

    pid = begun(slow)
    assert select.select([stopped[0]], [], [], 30)[0], "the child never came to its rename"
    save(made_at(1), tmp_path, **SMALL)
    hidden = [name for name in os.listdir(tmp_path) if name.startswith(".writing-")]
    assert len(hidden) == 1
    os.write(go[1], b".")
    assert os.waitpid(pid, 0)[1] == 0
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]
    for end in (*stopped, *go):
        os.close(end)


def test_only_temporary_names_of_dead_processes_are_cleared(tmp_path):
    machine, pid = checkpoint_files._machine(), os.getpid()
    alive = checkpoint_files._started(pid)
    keep = [
        f".writing-step-00000001-{machine}-{pid}-{alive}-0",
        f".writing-step-00000001-deadbeef-{pid}-{alive}-0",  # another machine's, changed just now
        ".writing-notes",
        "writing-step-00000001",
        ".git",
    ]
    clear = [
        f".writing-step-00000001-{machine}-{pid}-{int(alive) + 1}-0",  # the same process id, used again
        f".removing-step-00000001.1-{machine}-{pid}-{alive}-7",  # whoever began it
        f".writing-step-00000001-{machine}-{1 << 30}-12345-7",
        ".writing-step-00000009-deadbeef-1-1-0",
    ]
    for name in (*keep, *clear):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    for path in (tmp_path / clear[-1], tmp_path / clear[-1] / "file"):  # another machine's, a day without a change
        os.utime(path, (1e9, 1e9))
    save(made_at(1), tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*keep, "step-00000001"])
