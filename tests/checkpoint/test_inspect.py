"""`shoal inspect`: exit 0 when whole or equal, 1 when broken or different, 2 when there is nothing to look at."""

import json
from pathlib import Path

import pytest
import torch

from shoal.cli.main import main
from shoal.train.checkpoint import Checkpoint, save
from shoal.train.weights import weights_sha256


def flip_last_byte(path: Path) -> Path:
    file = sorted(path.glob("*.safetensors"))[-1]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    return file


@pytest.fixture
def run(tmp_path, checkpoint_of):
    """A run with checkpoints of steps 1 and 2; the first is the best."""
    for step in (1, 2):
        save(checkpoint_of(step), tmp_path / "run" / "checkpoints", best=step == 1, chunk_bytes=64)
    return tmp_path / "run"


def inspect(capsys, *args) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, args)])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def inspect_json(capsys, *args) -> tuple[int, dict]:
    code, out, err = inspect(capsys, *args, "--json")
    assert err == ""
    return code, json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("place", [".", "checkpoints"])
@pytest.mark.parametrize("verify", [[], ["--verify"]])
def test_a_run_or_its_folder_lists_its_checkpoints_newest_first(run, capsys, place, verify):
    code, out, _ = inspect(capsys, run / place, *verify)
    assert code == 0
    header, second, first = out.splitlines()
    assert header.split() == ["checkpoint", "size", "age", "state"]
    assert second.startswith("step-00000002  ")
    assert first.startswith("step-00000001  ")
    assert " best " in first
    assert " best " not in second
    assert first.rstrip().endswith("whole" if verify else "whole (sizes)")


def test_a_broken_one_is_listed_with_its_reason_and_exit_code_1(run, capsys):
    file = flip_last_byte(run / "checkpoints" / "step-00000002")
    assert inspect(capsys, run)[0] == 0  # its sizes are right
    code, out, _ = inspect(capsys, run, "--verify")
    assert code == 1
    assert f"{file}: bytes " in out
    (run / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    code, out, _ = inspect(capsys, run)
    assert code == 1
    assert "manifest.json: cannot be read (No such file or directory)." in out


def test_one_checkpoint_shows_its_facts_tensors_and_hash(run, capsys, checkpoint_of):
    code, out, _ = inspect(capsys, run / "checkpoints" / "step-00000002")
    wanted = checkpoint_of(2).tensors
    assert code == 0
    assert "lr           [0.5, 0.001]" in out
    assert "model/half" in out
    assert "bfloat16" in out
    model = {name.removeprefix("model/"): tensor for name, tensor in wanted.items() if name.startswith("model/")}
    assert out.rstrip().endswith(f"whole. weights_sha256 {weights_sha256(model)}")
    code, seen = inspect_json(capsys, run / "checkpoints" / "step-00000002")
    assert code == 0
    assert seen["ok"]
    assert seen["facts"]["step"] == 2
    assert [t["name"] for t in seen["tensors"]] == sorted(wanted)
    weight = next(t for t in seen["tensors"] if t["name"] == "model/weight")
    assert (weight["shape"], weight["dtype"]) == ([3, 4], "float32")
    assert weight["norm"] == pytest.approx(torch.linalg.vector_norm(wanted["model/weight"].double()).item(), rel=1e-12)


def test_verify_lists_all_damage_of_one_checkpoint(run, capsys):
    path = run / "checkpoints" / "step-00000002"
    file = flip_last_byte(path)
    raw = bytearray(file.read_bytes())
    raw[0] ^= 1
    file.write_bytes(raw)
    code, seen = inspect_json(capsys, path)
    assert (code, seen["ok"], len(seen["problems"])) == (1, False, 1)
    code, seen = inspect_json(capsys, path, "--verify")
    assert (code, seen["ok"], len(seen["problems"])) == (1, False, 2)
    assert seen["facts"]["step"] == 2
    code, out, _ = inspect(capsys, path, "--verify")
    assert "broken:\n" in out


def test_two_checkpoints_with_the_same_bits_are_equal(run, capsys, tmp_path, checkpoint_of):
    other = save(checkpoint_of(2), tmp_path / "other", shard_bytes=100)
    code, out, _ = inspect(capsys, run, other)
    assert code == 0
    assert out.rstrip().endswith("equal: all 10 tensors have the same bits.")


def test_two_checkpoints_that_differ_name_the_first_tensor(run, capsys, checkpoint_of):
    tensors = dict(checkpoint_of(2).tensors)
    tensors["model/weight"] = tensors["model/weight"] + 0.5
    tensors["model/new"] = torch.ones(1)
    del tensors["model/tied"]
    other = save(Checkpoint(tensors, {"step": 3, "recipe_hash": "ab"}), run.parent / "other")
    code, out, _ = inspect(capsys, run, other)
    assert code == 1
    assert "only in the first: model/tied" in out
    assert "only in the second: model/new" in out
    assert "fact step: 2 against 3" in out
    assert "12 of 12" in out
    assert out.rstrip().endswith("different: 8 tensors are equal, the first that differs is model/new.")
    code, seen = inspect_json(capsys, run, other)
    assert (code, seen["ok"], seen["first_different"]) == (1, False, "model/new")
    assert seen["max_abs"] == pytest.approx(0.5, rel=1e-6)


def test_a_broken_one_is_never_compared(run, capsys):
    path = run / "checkpoints" / "step-00000002"
    file = flip_last_byte(path)
    code, out, err = inspect(capsys, run / "checkpoints" / "step-00000001", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"shoal: {file}: bytes ")
    code, out, _ = inspect(capsys, run, run / "checkpoints" / "step-00000001")  # the run's newest whole one
    assert code == 0


def test_a_run_without_checkpoints_says_so(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert inspect(capsys, tmp_path) == (0, f"no checkpoints in {tmp_path / 'checkpoints'}\n", "")
    code, _, err = inspect(capsys, tmp_path, tmp_path)
    assert code == 2
    assert "no whole checkpoint in" in err


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_path_without_checkpoints_is_bad_input(tmp_path, capsys, place):
    code, out, err = inspect(capsys, tmp_path / place)
    assert (code, out) == (2, "")
    assert err.startswith("shoal: no run and no checkpoint in ")
    assert err.count("\n") == 1
