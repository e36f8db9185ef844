"""What the OpenAPI description promises is so: schemathesis makes requests of it, good ones and broken ones."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from forked_programs import Source, run
from serve.conftest import ADMIN, Asking
from serve.generation.tiny_gpt import save_gpt

import shoal
from shoal.models.bert import Head

# What covers every field's edges takes most of the time, and is for `make soak`.
SHORT = ("--phases", "examples,fuzzing", "--max-examples", "8")
WHOLE = ("--phases", "examples,coverage,fuzzing", "--max-examples", "10")
DEPTHS = pytest.mark.parametrize(
    "depth", [SHORT, pytest.param(WHOLE, marks=pytest.mark.soak)], ids=["in short", "whole"]
)
MODEL_DECIDES = "positive_data_acceptance"  # which shapes, tokens and pairs of fields fit, no schema can say
Checked = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checked]:
    """Forks of one process that has imported schemathesis."""
    source = Source(["schemathesis.cli.commands.run.executor", "schemathesis.specs.openapi.adapter"])
    folder = tmp_path_factory.mktemp("checked")
    program = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    always = ["--checks", "all", "--seed", "1", "--no-color", "--continue-on-failure", "--warnings", "off"]

    def check(description: str, *options: str) -> "subprocess.CompletedProcess[str]":
        return run([*program, description, *always, *options], source, cwd=folder)

    yield check
    source.close()


def keeps_its_word(checked: Checked, url: str, *options: str) -> None:
    done = checked(f"{url}/openapi.json", *options)
    assert done.returncode == 0, done.stdout
    made = re.search(r"(\d+) generated", done.stdout)
    assert made
    assert int(made[1]) > (10 if SHORT[1] in options else 50)
    assert Asking(url).get("/health/ready")[0] == 200


@DEPTHS
def test_of_texts_no_request_made_from_the_description_is_answered_otherwise_than_it_says(
    folders: Callable[[Head], Path], checked: Checked, depth: Sequence[str]
) -> None:
    with shoal.serve(folders("encoder"), admin_keys=(ADMIN,)) as server:
        keeps_its_word(checked, server.url, *depth)


@pytest.mark.soak
def test_of_questions_likewise(folders: Callable[[Head], Path], checked: Checked) -> None:
    with shoal.serve(folders("question-answering")) as server:
        keeps_its_word(checked, server.url, *WHOLE)


@DEPTHS
def test_of_tensors_likewise_as_far_as_a_description_can_say(
    scripted: Asking, checked: Checked, depth: Sequence[str]
) -> None:
    keeps_its_word(checked, scripted.url, "--exclude-checks", MODEL_DECIDES, *depth)


@DEPTHS
def test_of_generated_text_likewise(checked: Checked, tmp_path: Path, depth: Sequence[str]) -> None:
    with shoal.serve(str(save_gpt(tmp_path / "tiny"))) as server:
        keeps_its_word(checked, server.url, "--exclude-checks", MODEL_DECIDES, *depth)


def test_a_description_that_promises_too_much_is_found_out(scripted: Asking, checked: Checked, tmp_path: Path) -> None:
    described = json.loads(scripted.get("/openapi.json")[1])
    body = described["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body["properties"]["input"] = {"type": "string"}
    (tmp_path / "promises.json").write_text(json.dumps(described))
    where = ["--url", scripted.url, "--phases", "fuzzing", "--max-examples", "10", "--include-path", "/predict"]
    done = checked(str(tmp_path / "promises.json"), *where)
    assert done.returncode == 1
    assert "Schema-valid request rejected" in done.stdout
