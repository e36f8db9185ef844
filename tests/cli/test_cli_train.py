"""shoal train: from arguments to one call of the library, and from its result to what is printed."""

import json
from pathlib import Path

import pytest
from made_up_run import STARTED, committed, trained

from shoal.cli.train import printable
from shoal.errors import RunFailed
from shoal.recipe import presets
from shoal.recipe.layers import assemble
from shoal.recipe.plan import Plan
from shoal.run.run import Run


@pytest.fixture
def calls(library):
    """The calls of the library's ``train``, which reports two steps and a sample."""
    made = []

    def train(recipe, plan=None, **given):
        made.append({"recipe": recipe, "plan": plan, **given})
        tell = given["progress"]
        for event in (
            STARTED,
            committed(1),
            committed(4),
            {"event": "sampled", "step": 4, "text": "def fish():\n  swim"},
        ):
            tell(event)
        return trained()

    library("shoal.train.api", train=train)
    return made


def test_train_without_arguments_trains_the_default_preset_on_every_core(calls, shoal, monkeypatch):
    monkeypatch.setattr("shoal.cli.recipe_arguments.usable_cores", lambda: 3)
    code, _, _ = shoal("train")
    assert code == 0
    (call,) = calls
    assert call["recipe"] == assemble(None, "gpt-stdlib")[0]
    assert call["plan"] == Plan(mesh={"data": 3}, states="zero1")
    assert call["origins"]["steps"] == "preset gpt-stdlib"
    assert call["origins"]["mesh.data"] == "detected"
    assert (call["run_dir"], call["resume"]) == (None, None)


def test_every_flag_reaches_its_value_with_its_origin(calls, shoal):
    flags = "--steps 9 --batch 16 --shards 4 --seed 3 --precision float32 --lr 0.5 --workers 2 --fast --device cpu"
    shoal(
        "train", *flags.split(), "--tensorboard", "--run-dir", "here", "--set", "prefetch=5", "--set", "model.layers=1"
    )
    (call,) = calls
    recipe, plan, origins = call["recipe"], call["plan"], call["origins"]
    assert (recipe.steps, recipe.batch, recipe.shards, recipe.seed) == (9, 16, 4, 3)
    assert (recipe.precision, recipe.optimizer.lr, recipe.report.tensorboard) == ("float32", 0.5, True)
    assert recipe.model.options["layers"] == 1
    assert (plan.workers, plan.sync, plan.device, plan.prefetch) == (2, "fast", "cpu", 5)
    assert call["run_dir"] == Path("here")
    assert origins["optimizer.lr"] == "flag --lr"
    assert origins["sync"] == "flag --fast"
    assert origins["mesh.data"] == "flag --workers"
    assert origins["prefetch"] == "flag --set"


def test_epochs_as_a_flag_replace_the_preset_s_steps(calls, shoal):
    shoal("train", "--epochs", "2")
    assert (calls[0]["recipe"].steps, calls[0]["recipe"].epochs) == (0, 2)


def test_a_recipe_file_stands_alone(calls, shoal):
    Path("r.toml").write_text("steps = 7\n[model]\nkind = 'mlp'\n")
    shoal("train", "r.toml", "--placement", "5,3")
    assert calls[0]["recipe"].model.options == {}
    assert calls[0]["origins"]["steps"] == "file r.toml"
    assert calls[0]["plan"].placement == (5, 3)
    Path("plan.toml").write_text("[mesh]\ndata = 4\n")
    shoal("train", "r.toml", "--plan", "plan.toml")
    assert calls[1]["plan"].workers == 4
    shoal("train", "r.toml", "--plan", "plan.toml", "--mesh", "data=2")
    assert calls[2]["plan"].workers == 2
    assert calls[2]["origins"]["mesh.data"] == "flag --mesh"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt"], "unknown recipe (no such file or preset) 'gpt': did you mean 'gpt-"),
        (["gone.toml"], "no file 'gone.toml': check the path."),
        (["mnist-cnn"], "the recipe (mnist-cnn) needs your data: --set data.path=PATH"),
        (["--set", "layers"], "--set 'layers': write it as key=value"),
        (["--set", "modle.layers=1"], "unknown key 'modle.layers' in --set: did you mean 'model."),
        (["--set", "batch=x"], "'batch' in flag --set must be a whole number, got 'x'."),
        (["--precision", "bf16"], "unknown value for precision 'bf16' in flag --precision: did you mean 'bfloat16'?"),
        (["--steps", "5", "--epochs", "5"], "give steps (5) or epochs (5), not both."),
        (["--batch", "30"], "batch 30 is not divisible by 8 shards"),
        (["--workers", "9"], "9 workers for 8 shards"),
        (["--workers", "0"], "at least 1 worker, got 0"),
        (["--workers", "2", "--mesh", "data=2"], "give --workers or --mesh, not both"),
        (["--mesh", "data"], "--mesh 'data': write it as axis=workers"),
        (["--mesh", "pip=2"], "unknown axis 'pip' in plan.mesh: did you mean 'pipe'?"),
        (["--placement", "5;3"], "--placement '5;3': write whole numbers with commas between"),
        (["--placement", "5,4"], "places 9 shards, the recipe has 8"),
        (["--plan", "gone.toml"], "no file 'gone.toml'"),
        (["--resume", "gone"], "no run in 'gone'"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_starts(arguments, message, calls, shoal):
    code, out, err = shoal("train", *arguments)
    assert (code, out, calls) == (2, "", [])
    assert message in err
    assert err.count("\n") == 1


def test_explain_shows_every_value_with_its_origin_and_trains_nothing(calls, shoal):
    code, out, _ = shoal("train", "--explain", "--steps", "5", "--workers", "2")
    assert (code, calls) == (0, [])
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert rows["steps"] == ["steps", "5", "flag", "--steps"]
    assert rows["batch"] == ["batch", "32", "preset", "gpt-stdlib"]
    assert rows["mesh.data"] == ["mesh.data", "2", "flag", "--workers"]
    assert rows["model.compile"] == ["model.compile", "false", "default"]
    assert rows["model.task"] == ["model.task", '""', "default"]


def test_explain_as_json_is_one_list_of_rows(calls, shoal):
    _, out, _ = shoal("train", "--explain", "--json", "--seed", "4")
    rows = json.loads(out)
    assert {"key": "seed", "value": 4, "origin": "flag --seed"} in rows
    assert len({row["key"] for row in rows}) == len(rows)


def test_the_end_tells_the_figures_a_sample_where_the_run_is_and_what_to_type_next(calls, shoal):
    _, out, err = shoal("train")
    assert err == ""
    assert "1.8M parameters, 2 workers of 5+3 shards on cpu, float32" in out
    assert "step 4/4" in out
    assert "trained 4 steps on 128 samples in 1:15, loss 1.2500" in out
    assert "held out: loss 1.5, perplexity 4.482" in out
    assert "  | def fish():\n  |   swim" in out
    assert "run         runs/one" in out
    assert all(f"shoal {verb} runs/one" in out for verb in ("report", "eval", "inspect"))
    assert "--resume" not in out


def test_a_sample_cannot_steer_the_terminal():
    assert printable("a\tb\x1b[2J\r\x00\nc\u2028é") == "a       b\ufffd[2J\ufffd\ufffd\nc\ufffdé"


def test_json_writes_events_on_stderr_and_the_result_as_the_last_line_of_stdout(calls, shoal):
    code, out, err = shoal("train", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == trained()
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["started", "committed", "committed", "sampled"]


def test_a_number_that_json_does_not_have_is_written_as_text(library, shoal):
    library("shoal.train.api", train=lambda recipe, plan, **given: trained(loss=float("nan"), run_dir=Path("x")))
    _, out, _ = shoal("train", "--json")
    assert json.loads(out)["loss"] == "nan"
    assert json.loads(out)["run_dir"] == "x"


def test_an_interrupted_run_exits_130_and_says_how_to_go_on(library, shoal):
    library(
        "shoal.train.api", train=lambda recipe, plan, **given: trained(interrupted=True, figures={}, checkpoint=None)
    )
    code, out, _ = shoal("train")
    assert code == 130
    assert "interrupted after 4 steps" in out
    assert "shoal train --resume runs/one" in out
    assert "checkpoint  none" in out


def test_a_failed_run_is_one_line_and_exit_code_1(library, shoal):
    def train(recipe, plan, **given):
        raise RunFailed("rank 1 on vm died at step 3: killed by signal 9")

    library("shoal.train.api", train=train)
    assert shoal("train") == (1, "", "shoal: rank 1 on vm died at step 3: killed by signal 9\n")


def test_a_run_directory_under_the_working_directory_is_shown_relative_to_it(library, shoal, tmp_path):
    library("shoal.train.api", train=lambda recipe, plan, **given: trained(run_dir=str(tmp_path / "runs" / "a b")))
    assert "shoal report 'runs/a b'" in shoal("train")[1]


def test_resume_goes_on_with_the_run_s_recipe_and_the_workers_of_now(calls, shoal, monkeypatch):
    recipe, origins = assemble(None, "gpt-stdlib", {"seed": 3}, spelt={"seed": "--seed"})
    plan = Plan(mesh={"data": 1}, states="replicated", prefetch=7)
    found = {"mesh.data": "detected", "states": "chosen: one worker", "prefetch": "flag --set"}
    Run.create(recipe, plan, {**origins, **found}, Path("run"))
    monkeypatch.setattr("shoal.cli.recipe_arguments.usable_cores", lambda: 2)
    assert shoal("train", "--resume", "run")[0] == 0
    (call,) = calls
    assert call["resume"] == "run"
    assert call["recipe"] == recipe
    assert call["origins"]["seed"] == "flag --seed"
    assert call["plan"] == Plan(mesh={"data": 2}, states="zero1", prefetch=7)
    assert shoal("train", "--resume", "run", "--workers", "5", "--steps", "9")[0] == 0
    assert calls[1]["plan"].workers == 5
    assert calls[1]["recipe"].steps == 9
    code, _, err = shoal("train", "gpt-stdlib", "--resume", "run")
    assert code == 2
    assert "leave 'gpt-stdlib' out" in err


def test_workers_that_were_asked_for_are_kept_when_a_run_is_resumed(calls, shoal):
    recipe, origins = assemble(None, "gpt-stdlib")
    Run.create(recipe, Plan(mesh={"data": 3}), {**origins, "mesh.data": "flag --workers"}, Path("run"))
    shoal("train", "--resume", "run")
    assert calls[0]["plan"].workers == 3


def test_under_torchrun_each_process_joins_and_only_the_first_one_speaks(calls, shoal, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert shoal("train", "--json") == (0, "", "")
    assert calls[0]["origins"]["mesh.data"] == "torchrun"
    monkeypatch.setenv("RANK", "0")
    assert shoal("train")[1] != ""
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE='two'" in shoal("train")[2]


@pytest.mark.parametrize("preset", presets.names())
def test_every_preset_can_be_named(preset, calls, shoal):
    assert shoal("train", preset, "--set", "data.path=somewhere")[0] == 0
    assert calls[0]["origins"]["data.path"] == "flag --set"
