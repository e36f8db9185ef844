"""Whole jobs on files of a user's own: train, evaluate, export."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import shoal
from shoal.models.huggingface import load_folder
from shoal.recipe.plan import Plan
from shoal.recipe.recipe import DataSpec, ModelSpec, OptimizerSpec, Recipe, Reporting
from shoal.run.run import Run

COLOURS = ("red", "green", "blue")
THINGS = ("cat", "door", "ship", "hat")


def squad_file(path: Path) -> Path:
    """Which colour a thing has: one context a pair of things, and a question that has no answer."""
    paragraphs = []
    for number in range(24):
        thing, other = THINGS[number % 4], THINGS[(number + 1) % 4]
        colour, second = COLOURS[number % 3], COLOURS[(number // 3) % 3]
        context = f"the {thing} is {colour} and the {other} is {second}"
        asked = [
            {
                "id": f"{number}a",
                "question": f"the {thing} is ?",
                "answers": [{"text": colour, "answer_start": context.index(colour)}],
                "is_impossible": False,
            },
            {"id": f"{number}b", "question": "the moon is ?", "answers": [], "is_impossible": True},
        ]
        paragraphs.append({"context": context, "qas": asked})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "things", "paragraphs": paragraphs}]}))
    return path


def small_bert(task: str) -> ModelSpec:
    return ModelSpec(kind="bert", task=task, options={"layers": 1, "heads": 2, "width": 32, "ffn": 64})


def test_question_answering_is_scored_by_exact_match_and_f1_the_same_on_any_number_of_workers(agent, tmp_path):
    recipe = Recipe(
        model=small_bert("question-answering"),
        data=DataSpec(
            source="squad",
            path=str(squad_file(tmp_path / "squad.json")),
            validation=0.25,
            options={"context": 64, "question": 20, "stride": 16},
        ),
        optimizer=OptimizerSpec(lr=3e-3),
        batch=8,
        shards=4,
        steps=6,
        precision="float32",
    )
    result = shoal.train(recipe, Plan(mesh={"data": 2}), run_dir=tmp_path / "run", agent=agent)
    found = [shoal.evaluate(result["run_dir"], workers=workers, agent=agent) for workers in (1, 2, 3)]
    assert found[0] == found[1] == found[2]
    assert found[0]["split"] == "validation"
    assert found[0]["figures"]["total"] == 2 * 24 // 4
    assert 0 <= found[0]["figures"]["exact"] <= found[0]["figures"]["f1"] <= 100
    folder = shoal.export(result["run_dir"], tmp_path / "exported")
    assert load_folder(folder).config.kind == "bert"


def test_a_table_is_learnt_and_scored_on_its_own_test_file(agent, tmp_path):
    rows = [f"{x},{y},{'in' if x * x + y * y < 8 else 'out'}" for x in range(-4, 5) for y in range(-4, 5)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("\n".join(["x,y,where", *rows]) + "\n")
    recipe = Recipe(
        model=ModelSpec(kind="mlp"),
        data=DataSpec(
            source="csv",
            path=str(tmp_path / "train.csv"),
            test_path=str(tmp_path / "test.csv"),
            validation=0.1,
            options={"target": "where"},
        ),
        optimizer=OptimizerSpec(lr=3e-2),
        batch=16,
        shards=4,
        epochs=20,
        precision="float32",
        report=Reporting(evaluate_every=1000),
    )
    result = shoal.train(recipe, run_dir=tmp_path / "run", agent=agent)
    figures = shoal.evaluate(result["run_dir"], agent=agent)
    assert figures["split"] == "test"
    assert figures["samples"] == 81
    assert figures["figures"]["accuracy"] > 0.9  # a majority vote gives 0.69


def test_a_model_and_a_loss_of_the_users_own_are_trained_from_their_names(agent, tmp_path):
    Path(tmp_path, "my_models.py").write_text(
        "import torch\n"
        "def make(facts):\n"
        "    return torch.nn.Linear(facts['features'], 1)\n"
        "def loss(model, batch):\n"
        "    error = (model(batch['input']) - batch['target']).abs()\n"
        "    return error.sum(), error.numel()\n"
    )
    (tmp_path / "line.csv").write_text("x,y\n" + "".join(f"{x / 8},{x / 4 + 1}\n" for x in range(64)))
    recipe = Recipe(
        model=ModelSpec(kind="custom", factory="my_models:make", loss="my_models:loss"),
        data=DataSpec(source="csv", path=str(tmp_path / "line.csv"), validation=0.0, options={"target": "y"}),
        optimizer=OptimizerSpec(name="sgd", lr=0.5),
        batch=16,
        shards=4,
        epochs=30,
        precision="float32",
    )
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    command = [sys.executable, "-m", "shoal", "train", "recipe.toml", "--workers", "2", "--run-dir", "run", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["loss"] < 0.5  # the mean distance is 4 for the best constant


@pytest.mark.slow
def test_a_loop_typed_into_a_session_without_a_file_runs_on_two_workers(tmp_path):
    """What a notebook does: the function lives in __main__, which no worker can import."""
    program = (Path(__file__).parents[2] / "examples" / "with_shoal.py").read_text().split("if __name__")[0]
    program += "for workers in (1, 2):\n    found = shoal.launch(main, workers=workers)\n"
    program += "    print(sum(tensor.sum().item() for tensor in found.values()))\n"
    done = subprocess.run(
        [sys.executable, "-"], input=program, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second


@pytest.mark.slow
def test_a_compiled_model_is_exact_too(agent, tmp_path):
    recipe = Recipe(
        model=ModelSpec(kind="mlp", compile=True),
        data=DataSpec(source="csv", path=str(tmp_path / "line.csv"), validation=0.0, options={"target": "y"}),
        batch=16,
        shards=4,
        steps=3,
        precision="float32",
    )
    (tmp_path / "line.csv").write_text("x,y\n" + "".join(f"{x / 8},{x / 4 + 1}\n" for x in range(64)))
    hashes = {
        shoal.train(recipe, Plan(mesh={"data": n}), run_dir=tmp_path / str(n), agent=agent)["weights_sha256"]
        for n in (1, 2)
    }
    assert len(hashes) == 1
    assert Run(tmp_path / "1").recipe.model.compile
