"""Runs that are made or gone on with at the same moment, in one working directory."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from train.tiny_runs import recipe, splits

from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Recipe
from shoal.run.run import Run, origin
from shoal.train.api import train

HOLD = "import sys; from pathlib import Path; from shoal.run.run import Run\nwith Run(Path(sys.argv[1])).held(True): "


def test_runs_that_are_made_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda seed: Run.create(Recipe(steps=1, seed=seed), Plan(), {}), range(24)))
    assert len({run.path for run in runs}) == 24
    assert sorted(run.recipe.seed for run in runs) == list(range(24))
    assert Run.find("latest").path in {run.path for run in runs}
    assert {path.name for path in Path("runs").iterdir()} == {"latest", *(run.path.name for run in runs)}


def test_of_runs_that_are_made_in_one_named_folder_at_once_one_is_made(tmp_path):
    def made(seed: int) -> int | str:
        try:
            return Run.create(Recipe(steps=1, seed=seed), Plan(), {}, tmp_path / "run").recipe.seed
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(made, range(24)))
    [seed] = [one for one in told if isinstance(one, int)]
    assert all("holds a run already" in one for one in told if isinstance(one, str))
    assert Run.find(tmp_path / "run").recipe.seed == seed


def test_a_folder_in_which_no_run_could_be_made_may_be_tried_again(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as planted:
        planted.setattr("shoal.run.run.os.replace", full)
        with pytest.raises(UserError, match="No space left"):
            Run.create(Recipe(steps=1), Plan(), {}, tmp_path / "run")
    assert Run.create(Recipe(steps=1), Plan(), {}, tmp_path / "run").recipe.steps == 1


def test_a_run_that_another_process_trains_is_not_gone_on_with_until_that_one_has_ended(tmp_path):
    run = Run.create(Recipe(steps=1), Plan(), {}, tmp_path / "run")
    program = [sys.executable, "-c", HOLD + "print('held', flush=True); sys.stdin.read()", str(run.path)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is being trained by another process"), run.held(True):
            pass
        with run.held(False):
            pass
        other.kill()
    with run.held(True):
        pass
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "origins.json",
        "plan.toml",
        "recipe.toml",
    ]


def test_training_goes_on_with_a_run_only_when_nobody_else_trains_it(agent, tmp_path):
    given = {"plan": Plan(mesh={"data": 2}, device="cpu"), "data": splits("mlp", 101), "agent": agent}
    run = Run(Path(train(recipe("mlp", steps=2), run_dir=tmp_path / "run", **given)["run_dir"]))
    with run.held(True), pytest.raises(UserError, match="is being trained by another process"):
        train(recipe("mlp", steps=3), resume=run.path, **given)
    assert train(recipe("mlp", steps=3), resume=run.path, **given)["steps"] == 3


def test_a_run_is_let_go_although_a_forked_child_lives_on(tmp_path):
    run = Run.create(Recipe(steps=1), Plan(), {}, tmp_path / "run")
    fork = "\n  if (pid := __import__('os').fork()) == 0: sys.stdin.read(); sys.exit()\nprint('let go', flush=True)"
    program = [sys.executable, "-c", HOLD + fork, str(run.path)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "let go\n"
        with run.held(True):
            other.stdin.close()


@pytest.mark.parametrize("target", ["runs/x", "runs/x@", "runs/x@²", "@3"])
def test_a_checkpoint_to_start_from_that_is_written_wrongly_is_one_line(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"write it as RUN@STEP|no run in"):
        origin(target)
