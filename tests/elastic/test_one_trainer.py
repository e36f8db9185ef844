"""A run that is trained elastically is nobody else's, and one that somebody else trains is not gone on with."""

import subprocess
import sys
from pathlib import Path

import pytest
from train.tiny_runs import recipe, splits

from shoal.elastic.api import train_elastic
from shoal.elastic.hosts import jobs
from shoal.elastic.promises import Promises
from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.run.run import Run

DATA = splits("mlp", 101)
TAKEN = "is being trained by another process"
HOLD = """
import sys
from pathlib import Path
from shoal.run.hold import Hold
hold = Hold(shared=True)
hold.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nobody_goes_on_with_a_run_while_it_trains_elastically(disturb, undisturbed):
    wanted = recipe("mlp", steps=20)
    tried: list[str] = []

    def others_try(event):
        run = Run(Path(event["run_dir"]))
        if event["event"] != "committed" or event["step"] != 5:
            return
        with pytest.raises(UserError, match=TAKEN), run.held(True):  # as a plain run does, or another elastic one
            pass
        with pytest.raises(UserError, match=TAKEN):
            jobs(wanted, Plan(device="cpu"), None, None, run.path, None, None, DATA, hosts=2, least=1)
        with pytest.raises(UserError, match="holds a run already"):
            train_elastic(wanted, Plan(device="cpu"), run_dir=run.path, data=DATA)
        tried.append(str(run.path))

    run = disturb(wanted, data=DATA, progress=others_try)
    assert len(tried) == 1
    assert run.result["weights_sha256"] == undisturbed(wanted, data=DATA)
    assert run.steps == list(range(1, 21))
    assert not (run.run.path / "agents").exists()
    with run.run.held(True):
        pass


def test_an_elastic_run_leaves_one_that_somebody_else_trains_as_it_is(disturb):
    first = disturb(recipe("mlp", steps=4), data=DATA).run
    before = contents(first.path)
    longer = recipe("mlp", steps=8)
    with first.held(True), pytest.raises(UserError, match=TAKEN):
        disturb(longer, data=DATA, resume=first.path)
    assert contents(first.path) == before
    assert disturb(longer, data=DATA, resume=first.path).steps == list(range(1, 9))


def test_a_folder_that_was_made_for_a_run_that_cannot_begin_goes_again(disturb, tmp_path):
    with pytest.raises(UserError, match="holds no sample"):
        disturb(recipe("mlp"), data=splits("mlp", 0))
    assert not (tmp_path / "run").exists()


def test_agents_of_one_run_hold_it_together_and_nobody_else_does(tmp_path):
    run = Run.create(recipe("mlp"), Plan(), {}, tmp_path / "run")
    program = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        made = jobs(recipe("mlp"), Plan(device="cpu"), None, run.path, None, None, None, DATA, hosts=2, least=1)
        assert made(1, (("127.0.0.1", 1), ("127.0.0.1", 2)), "b").run_dir == run.path
        with pytest.raises(UserError, match=TAKEN), run.held(True):
            pass
        other.kill()
    with run.held(True):
        pass


def test_a_second_agent_of_a_number_keeps_out_of_the_promises_of_the_first(tmp_path):
    first = Promises(tmp_path / "run" / "agents" / "0.log", 3)
    with pytest.raises(UserError, match=r"agent 0 of the run in .*run' is at work already"):
        Promises(first.path, 3)
    Promises(first.path.with_name("1.log"), 3).close(forget=False)
    first.close(forget=False)
    Promises(first.path, 3).close(forget=False)
