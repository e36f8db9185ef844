"""Time travel: a new run that starts from a checkpoint of another one has the bits of that one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from train.tiny_runs import recipe, splits

from shoal.data.ledger import Ledger
from shoal.errors import UserError
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import Reporting
from shoal.run.run import Run
from shoal.train.api import train

DATA = splits("cnn", 101)
WHOLE = recipe("resnet", steps=12, report=Reporting(evaluate_every=4, checkpoint_every=4, keep=0, sample=False))


@pytest.fixture(scope="module")
def original(agent, tmp_path_factory) -> dict:
    plan = Plan(mesh={"data": 2}, device="cpu")
    return train(WHOLE, plan, agent=agent, data=DATA, run_dir=tmp_path_factory.mktemp("original") / "run")


def test_the_same_recipe_from_any_checkpoint_ends_in_the_same_bits_on_any_number_of_workers(run, original, tmp_path):
    for step, workers in ((4, 1), (8, 3)):
        folder = tmp_path / f"from{step}"
        again = run(WHOLE, workers, data=DATA, start=f"{original['run_dir']}@{step}", run_dir=folder)
        for figure in ("weights_sha256", "samples", "steps", "loss", "figures"):
            assert again[figure] == original[figure], figure
        events = Run(folder).events()
        assert [e["step"] for e in events if e["event"] == "branched"] == [step]
        assert [e["step"] for e in events if e["event"] == "committed"] == list(range(step + 1, 13))
        made = Ledger(len(DATA.train), WHOLE.batch, WHOLE.shards, WHOLE.micro_batches, WHOLE.seed)
        assert made.verify(events).wrong == ()
        assert Run(folder).recipe == Run(Path(original["run_dir"])).recipe


def test_another_learning_rate_goes_its_own_way_and_the_original_is_untouched(run, original):
    before = {path: path.stat().st_mtime_ns for path in Path(original["run_dir"]).rglob("*")}
    other = replace(WHOLE, optimizer=replace(WHOLE.optimizer, lr=0.5))
    again = run(other, data=DATA, start=f"{original['run_dir']}@8")
    assert again["weights_sha256"] != original["weights_sha256"]
    assert {path: path.stat().st_mtime_ns for path in Path(original["run_dir"]).rglob("*")} == before


def test_a_recipe_with_another_order_of_samples_is_refused(run, original):
    with pytest.raises(UserError, match="made with batch = 16, this run has 8: going on would not give the same bits"):
        run(replace(WHOLE, batch=8), data=DATA, start=f"{original['run_dir']}@8")


def test_a_branch_can_be_resumed_and_branched_from_again(run, original, tmp_path):
    half = run(replace(WHOLE, steps=8), data=DATA, start=f"{original['run_dir']}@4", run_dir=str(tmp_path / "branch"))
    end = run(WHOLE, data=DATA, resume=half["run_dir"])
    assert end["weights_sha256"] == original["weights_sha256"]
    again = run(WHOLE, data=DATA, start=f"{half['run_dir']}@8")
    assert again["weights_sha256"] == original["weights_sha256"]


def test_what_cannot_be_started_from_is_one_line_before_anything_is_made(run, original, tmp_path):
    folder = shutil.copytree(original["run_dir"], tmp_path / "original")

    def told(start: str, **more) -> str:
        with pytest.raises(UserError) as error:
            run(WHOLE, data=DATA, start=start, run_dir=tmp_path / "new", **more)
        assert not (tmp_path / "new").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"'{folder}@7': there is no checkpoint of step 7, the nearest is 8 (of 4, 8, 12)." in told(f"{folder}@7")
    assert "write it as RUN@STEP" in told(str(folder))
    assert "write it as RUN@STEP" in told(f"{folder}@x")
    assert "no run in" in told(f"{tmp_path}@4")
    assert "not both" in told(f"{folder}@4", resume=folder)
    file = Path(folder) / "checkpoints" / "step-00000008" / "state-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    line = told(f"{folder}@8")
    assert "are not those that were written" in line
    assert line.endswith("The nearest other one is of step 4.")
    unmade = tmp_path / "unmade"
    with pytest.raises(UserError, match=r"a run of 12 steps has nothing left to do there: raise --steps\.$"):
        run(WHOLE, data=DATA, start=f"{folder}@12", run_dir=unmade)
    assert not unmade.exists()
