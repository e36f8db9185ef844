"""What the OpenAPI description promises is so: schemathesis makes requests of it, good ones and broken ones."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serve.conftest import Asking
from serve.generation.tiny_gpt import save_gpt

import shoal
from shoal.models.bert import Head
from shoal.serve.http import description, routes

ADMIN = "the-admins-own-key"
MODEL_DECIDES = "positive_data_acceptance"  # which shapes, tokens and pairs of fields fit, no schema can say


def schemathesis(url: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    always = ["--checks", "all", "--seed", "1", "--no-color", "--continue-on-failure", "--max-examples", "20"]
    phases = ["--phases", "examples,coverage,fuzzing", "--warnings", "off"]
    return subprocess.run(
        [*program, f"{url}/openapi.json", *always, *phases, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


@pytest.fixture(scope="module")
def targets(folders: Callable[[Head], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "embeddings": str(folders("encoder")),
        "question-answering": str(folders("question-answering")),
        "tensors": "serve.served_models:scripted",
        "text-generation": str(save_gpt(tmp_path_factory.mktemp("gpt") / "tiny")),
    }


@pytest.mark.parametrize("task", ["embeddings", "question-answering", "tensors", "text-generation"])
def test_no_request_made_from_the_description_is_answered_otherwise_than_it_says(
    task: str, targets: dict[str, str], tmp_path: Path
) -> None:
    beyond = ["--exclude-checks", MODEL_DECIDES] if task in ("tensors", "text-generation") else []
    with shoal.serve(targets[task], admin_keys=(ADMIN,)) as server:
        done = schemathesis(server.url, tmp_path, *beyond)
        assert done.returncode == 0, done.stdout
        made = re.search(r"(\d+) generated", done.stdout)
        assert made
        assert int(made[1]) > 100
        assert Asking(server.url).get("/health/ready")[0] == 200


def test_a_description_that_promises_too_much_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, targets: dict[str, str]
) -> None:
    def describe(*given: Any) -> dict[str, Any]:
        made = description.describe(*given)
        body = made["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body["properties"]["input"] = {"type": "string"}
        return made

    monkeypatch.setattr(routes, "describe", describe)
    with shoal.serve(targets["tensors"]) as server:
        done = schemathesis(server.url, tmp_path)
    assert done.returncode == 1
    assert "Schema-valid request rejected" in done.stdout
