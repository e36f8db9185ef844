"""Other weights come in under load: no request fails, and none is answered by two versions."""

import asyncio
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serve.conftest import ADMIN, Served, gone, save_bert
from serve.saved_runs import text_run

from shoal.errors import UserError
from shoal.run.run import Run
from shoal.serve import following
from shoal.serve.options import ServeOptions
from shoal.serve.versions import Versions
from shoal.train import checkpoint

Start = Callable[..., Served]
pytestmark = pytest.mark.slow

TEXTS = ["a b c", "d e f g", "h", "red ?"] * 10  # a request in many parts, for many batches


class Clients:
    """Ask for the same texts again and again; all answers by their content, and errors."""

    def __init__(self, server: Served, body: dict[str, Any], count: int = 3) -> None:
        self.server, self.body = server, json.dumps(body)
        self.seen: dict[str, int] = {}
        self.failed: list[Any] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.ask) for _ in range(count)]

    def ask(self) -> None:
        connection = self.server.connection()
        while not self.stop.is_set():
            connection.request("POST", "/predict", self.body)
            answer = connection.getresponse()
            told = answer.read()
            if answer.status != 200:
                self.failed.append(told)
                break
            scores = [tuple(round(v, 3) for v in p["scores"].values()) for p in json.loads(told)["predictions"]]
            self.seen[str(scores)] = self.seen.get(str(scores), 0) + 1
        connection.close()

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def changed(folder: Path, path: Path) -> Path:
    """The same model with other weights."""
    shutil.copytree(folder, path)
    made = save_bert(path.with_name(path.name + "-other"), "classification", classes=3, layers=2)
    from safetensors.torch import load_file, save_file

    tensors = load_file(made / "model.safetensors")
    save_file({n: t * (-1 if n == "classifier.weight" else 1) for n, t in tensors.items()}, path / "model.safetensors")
    return path


def test_weights_are_changed_and_changed_back_under_load_and_no_request_fails_or_is_mixed(
    served: Start, tmp_path: Path
) -> None:
    first = save_bert(tmp_path / "first", "classification", classes=3)
    second = changed(first, tmp_path / "second")
    (tmp_path / "keys").write_text(ADMIN)
    server = served(first, "--replicas", "2", "--batch", "4", "--admin-keys", tmp_path / "keys")
    assert server.processes_become(3)
    before = server.pids()
    admin = {"authorization": f"Bearer {ADMIN}"}
    with Clients(server, {"text": TEXTS}) as clients:
        for target in (second, first, second):
            status, told = server.post("/v1/reload", {"target": str(target)}, **admin)
            assert status == 200, told
            assert told["source"] == str(target)
        asked = server.post("/predict", {"text": TEXTS})[1]
    assert clients.failed == []
    assert len(clients.seen) == 2, "each answer is wholly of the one or of the other version"
    last = str([tuple(round(v, 3) for v in p["scores"].values()) for p in asked["predictions"]])
    assert last in clients.seen
    assert gone(before), "the processes of the first version have ended"
    assert server.processes_become(3)
    assert server.metric("shoal_reloads_total") == 3


def test_what_cannot_be_served_instead_is_refused_and_the_old_model_goes_on(served: Start, tmp_path: Path) -> None:
    first = save_bert(tmp_path / "first", "classification", classes=3)
    wider = save_bert(tmp_path / "wider", "classification", classes=4)
    (tmp_path / "keys").write_text(ADMIN)
    server = served(first, "--admin-keys", tmp_path / "keys")
    admin = {"authorization": f"Bearer {ADMIN}"}
    answers = [
        server.post("/v1/reload", {"target": str(target)}, **headers)
        for target, headers in ((wider, admin), (tmp_path / "none", admin), (wider, {}))
    ]
    assert [status for status, _ in answers] == [409, 422, 401]
    assert "another labels" in answers[0][1]["error"]["message"]
    assert server.post("/predict", {"text": "a"})[0] == 200
    assert server.processes_become(2), "nothing of what was tried is left"


def test_each_newer_checkpoint_of_a_run_that_is_followed_is_served(served: Start, tmp_path: Path) -> None:
    run = Run.find(text_run(tmp_path))
    server = served(run.path, "--follow")
    ask = {"text": "line 1"}
    before = server.post("/predict", ask)[1]["predictions"][0]["scores"]
    held = checkpoint.newest(run.checkpoints)[0]
    assert held is not None
    changed = {n: -t if n == "model/classifier.weight" else torch.as_tensor(t) for n, t in held.tensors.items()}
    checkpoint.save(checkpoint.Checkpoint(changed, {"step": 2}), run.checkpoints)
    assert server.metric_reaches("shoal_reloads_total", 1, within_s=60)
    after = server.post("/predict", ask)[1]["predictions"][0]["scores"]
    assert abs(after["a"] - before["a"]) > 1e-3
    assert json.loads(server.get("/v1/models")[1])["data"][0]["id"] == run.path.name


def test_a_canary_answers_its_share_and_nothing_else_until_it_is_promoted(served: Start, tmp_path: Path) -> None:
    first = save_bert(tmp_path / "first", "classification", classes=3)
    second = changed(first, tmp_path / "second")
    (tmp_path / "keys").write_text(ADMIN)
    server = served(first, "--batch", "4", "--admin-keys", tmp_path / "keys")
    admin = {"authorization": f"Bearer {ADMIN}"}

    def by_version() -> dict[str, float]:
        lines = server.get("/metrics")[1].decode().splitlines()
        found = [line for line in lines if line.startswith("shoal_version_requests_total{")]
        return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in found}

    def post(path: str, body: Any) -> tuple[int, Any]:
        return server.post(f"/v1/reload{path}", body, **admin)

    assert [post(path, {})[0] for path in ("/promote", "/rollback")] == [409, 409], "there is none yet"
    assert server.post("/v1/reload/promote", {})[0] == 401
    status, told = post("", {"target": str(second), "share": 0.25})
    assert status == 200, told
    assert [(one["version"], one["share"]) for one in told["versions"]] == [(0, 0.75), (1, 0.25)]
    assert post("", {})[0] == 409, "one at a time"
    with Clients(server, {"text": TEXTS}) as clients:
        while sum(by_version().values()) < 30:
            pass
        os.kill(server.replicas()[-1], signal.SIGKILL)
        while sum(by_version().values()) < 60:
            server.get("/health/live")  # takes nobody's turn
    assert clients.failed == [], "not even when a process of the canary is killed"
    assert len(clients.seen) == 2, "each answer is wholly of the one or of the other"
    shares = by_version()
    assert abs(shares["1"] - 0.25 * sum(shares.values())) <= 1
    assert post("/rollback", {})[1]["versions"] == [{"version": 0, "source": str(first), "share": 1.0}]
    assert server.processes_become(2)
    only = [server.post("/predict", {"text": "a"})[1]["predictions"] for _ in range(6)]
    assert all(one == only[0] for one in only)
    assert post("", {"target": str(second), "share": 0.25})[0] == 200
    status, told = post("/promote", {})
    assert (status, [one["source"] for one in told["versions"]]) == (200, [str(second)])
    assert server.processes_become(2)
    assert server.post("/predict", {"text": "a"})[1]["predictions"] != only[0]


def test_a_version_is_needed_until_the_last_request_that_began_with_it_has_ended() -> None:
    versions = Versions()
    versions.try_out(1, 0.5)
    begun = [versions.begin() for _ in range(6)]
    assert begun == [0, 1, 0, 1, 0, 1]
    assert versions.done([0, 1]) == []
    versions.withdraw()
    assert versions.done([0, 1]) == [], "three requests that began with it have not ended"
    for version in begun:
        versions.end(version)
    assert versions.done([0, 1]) == [1]
    assert {versions.begin() for _ in range(4)} == {0}


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_followed_checkpoint_comes_as_a_canary_and_a_newer_one_takes_its_place(
    hosts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if hosts > 1:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
    done: list[Any] = []
    names = iter(["step-00000001", "step-00000002", "step-00000002", "step-00000003"])

    class Asked:
        has_canary = False
        options = ServeOptions(canary=0.1, follow=True, admin_keys=(ADMIN,))

        async def reload(self, target: str, share: float) -> None:
            done.append((target, share))
            self.has_canary = True

        async def roll_back(self) -> None:
            done.append("rolled back")

    monkeypatch.setattr(following, "LOOK_S", 0.0)
    monkeypatch.setattr(following, "newest_name", lambda run: next(names))
    with pytest.raises(RuntimeError):  # no more names
        asyncio.run(following.follow(Asked(), tmp_path))  # type: ignore[arg-type]
    steps = ["", ""] if hosts == 1 else [str(tmp_path / "checkpoints" / f"step-0000000{n}") for n in (2, 3)]
    assert done == [(steps[0], 0.1), "rolled back", (steps[1], 0.1)], "of all hosts the same one"
    with pytest.raises(UserError, match="needs --follow"):
        ServeOptions(canary=0.1)
    with pytest.raises(UserError, match="a share of the requests"):
        ServeOptions(canary=0.0)
