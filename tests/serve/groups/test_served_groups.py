"""Groups behind a real server: whatever member is killed, no client sees an error, and nothing is left behind."""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from serve.conftest import Served, gone
from serve.generation.tiny_gpt import save_gpt
from serve.saved_runs import gpt_run
from serve.served_models import FAULT, HANG, POISON, SLOW
from serve.test_faults import PATIENT, Load

from shoal.cli.main import main
from shoal.data.tokenizer import from_description
from shoal.models.generation import generate
from shoal.serve.target import load

Start = Callable[..., Served]
pytestmark = pytest.mark.slow
MESH = ("--mesh", "pipe=2")


def test_members_leaders_and_parents_are_killed_under_load_and_no_client_sees_an_error(served: Start) -> None:
    server = served("serve.served_models:staged", *MESH, *PATIENT, "--replicas", "2", "--batch", "4", "--hang-s", "2")
    assert server.told["mesh"] == {"pipe": 2}
    assert server.metric("shoal_mesh_pipe") == 2
    assert server.processes_become(1 + 4)
    with Load(server) as load:
        load.reaches(50)
        for member in (0, 1, 3):  # a leader, then the last stage of the other group, of a new one
            whole = set(server.replicas())
            killed = sorted(whole)[member]
            os.kill(killed, signal.SIGKILL)
            assert gone([killed])
            load.more(50)
            while len(left := whole & set(server.replicas())) > 2:
                load.more(1)
            assert server.processes_become(1 + 4)
            assert len(left) == 2, "its group has gone as a whole, and the other is still there"
        os.kill(server.pids()[0], signal.SIGKILL)
        load.more(100)
        assert server.post("/predict", {"input": [[FAULT, 0.0]]})[0] == 500
        status, answer = server.post("/predict", {"input": [[POISON, 0.0]]})
        assert (status, "died each of the 3 times" in answer["error"]["message"]) == (500, True)
        assert server.post("/predict", {"input": [[HANG, 0.0]]})[0] == 500, "its groups were killed one after another"
        load.more(50)
    assert not load.errors
    assert set(load.answers) == {(200, True)}
    assert server.processes_become(1 + 4)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.post, "/predict", {"input": [[SLOW, float(i)]]}) for i in range(6)]
        end = time.monotonic() + 10
        while server.metric("shoal_requests_open") < 6 and time.monotonic() < end:
            time.sleep(0.01)
        pids = server.pids()
        code, _ = server.end()
        assert [future.result()[0] for future in asked] == [200] * 6, "a server that leaves answers what is open"
    assert code == 0
    assert gone(pids)


def test_a_group_sleeps_wakes_and_takes_other_weights(served: Start, tmp_path: Path) -> None:
    """Streams of text go on over a change of weights; groups come and go with the load, down to none."""
    first = save_gpt(tmp_path / "first", layers=2)
    keys = tmp_path / "keys"
    keys.write_text("the-admins-own-key\n")
    server = served(
        first, "--mesh", "tensor=2", "--min-replicas", "0", "--calm-s", "0.3", "--admin-keys", keys, "--name", "g"
    )
    body = {"model": "g", "prompt": "hello world", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    told = []
    for _ in range(2):
        assert server.processes_become(1), "it sleeps"
        status, answer = server.post("/v1/completions", body)
        assert status == 200
        told.append(answer["choices"][0]["text"])
    assert told[0] == told[1]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.post, "/v1/completions", body) for _ in range(4)]
        status, _ = server.post("/v1/reload", {"target": str(first)}, Authorization="Bearer the-admins-own-key")
        assert status == 200
        assert [future.result()[1]["choices"][0]["text"] for future in asked] == told[:1] * 4
    assert server.processes_become(1), "one parent, asleep"
    assert server.metric("shoal_replicas_lost_total") == 0


def test_a_run_of_a_mixture_is_served_with_its_experts_in_two_processes(served: Start, tmp_path: Path) -> None:
    run = gpt_run(tmp_path, "moe", experts=3)
    loaded = load(str(run))
    tokenizer = from_description(loaded.facts["tokenizer"])
    server = served(run, "--mesh", "expert=2", "--name", "g")
    prompts = ["the", "quick brown", "a lazy dog"]
    body = {"model": "g", "prompt": prompts, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    status, answer = server.post("/v1/completions", body)
    assert status == 200
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        tokens = tokenizer.encode(prompt)
        alone = generate(loaded.model, torch.tensor([tokens]), 8, temperature=0)[0, len(tokens) :].tolist()
        assert choice["text"] == tokenizer.decode(alone)


def test_a_mesh_that_a_model_does_not_have_is_one_line_and_exit_code_2(
    served: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(save_gpt(tmp_path / "gpt")), "--mesh", "pipe=9", "--port", "0"]) == 2
    assert main(["serve", "anything", "--mesh", "data=2"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "the model has 2 layers: use pipe=2 at most" in lines[0]
    assert "--replicas 2" in lines[1]


def test_a_stream_goes_on_after_the_token_that_its_client_has_seen(served: Start, tmp_path: Path) -> None:
    server = served(save_gpt(tmp_path / "gpt", layers=4, context=1024), *MESH, "--name", "g")
    body = {"model": "g", "prompt": "hello", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    _, whole = server.post("/v1/completions", body)
    connection = server.connection()
    connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}))
    answer = connection.getresponse()
    text, killed = "", False
    for line in answer:
        if line.startswith(b"data: {"):
            text += json.loads(line[6:])["choices"][0]["text"]
            if len(text) > 40 and not killed:
                os.kill(sorted(server.replicas())[1], signal.SIGKILL)
                killed = True
    connection.close()
    assert killed
    assert text == whole["choices"][0]["text"]
    assert server.metric_reaches("shoal_replicas_lost_total", 1)
