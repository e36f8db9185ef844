"""The verbs one after another on one small real run, as a person types them."""

import json
from pathlib import Path

import pytest

from shoal.run.run import Run

TINY = """
batch = 8
shards = 4
steps = 4
precision = "float32"
[model]
kind = "gpt"
layers = 1
heads = 2
width = 16
dropout = 0.1
[data]
path = "text.txt"
context = 16
validation = 0.2
test = 0.1
"""


def write_tiny() -> None:
    Path("text.txt").write_text("all fish swim as one body\n" * 300, encoding="utf-8")
    Path("tiny.toml").write_text(TINY, encoding="utf-8")


@pytest.mark.slow
def test_a_run_is_trained_resumed_evaluated_reported_inspected_and_exported(launches_here, shoal):
    write_tiny()

    code, out, err = shoal("train", "tiny.toml", "--workers", "2", "--run-dir", "two", "--json")
    assert code == 0, err
    whole = json.loads(out.splitlines()[-1])
    assert whole["steps"] == 4
    assert json.loads(err.splitlines()[0])["event"] == "started"
    origins = Run.find("two").origins
    assert (origins["mesh.data"], origins["steps"]) == ("flag --workers", "file tiny.toml")

    code, out, err = shoal("train", "tiny.toml", "--workers", "1", "--run-dir", "one")
    assert code == 0, err
    assert whole["weights_sha256"] in out

    assert shoal("train", "--resume", "one", "--steps", "6", "--placement", "3,1")[0] == 0
    assert Run.find("one").plan.placement == (3, 1)

    code, out, err = shoal("eval", "one", "--json")
    assert code == 0, err
    assert json.loads(out)["figures"]["loss"] > 0

    assert shoal("report", "one", "--compare", "two", "--output", "page.html")[0] == 0
    assert "</html>" in Path("page.html").read_text(encoding="utf-8")

    code, out, _ = shoal("inspect", "one", "--verify", "--json")
    assert code == 0
    assert json.loads(out)["ok"]
    code, out, _ = shoal("inspect", "one", "two")
    assert (code, "different" in out) == (1, True)

    code, _, err = shoal("export", "one", "folder")
    assert code == 0, err
    assert {"config.json", "model.safetensors"} <= {file.name for file in Path("folder").iterdir()}


@pytest.mark.slow
def test_prove_tells_that_a_real_recipe_has_the_same_bits_on_every_worker_count(launches_here, shoal):
    write_tiny()
    code, out, err = shoal("prove", "tiny.toml", "--workers", "1,3", "--steps", "3", "--json")
    assert code == 0, err
    assert all(plan["ok"] for plan in json.loads(out.splitlines()[-1])["plans"])
