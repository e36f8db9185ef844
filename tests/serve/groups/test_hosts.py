"""A group over two emulated hosts: a `shoal serve` on each, which know of each other by torchrun's variables alone."""

import json
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from forked_programs import Program, Source
from safetensors.torch import load_file, save_file
from serve.conftest import Served, children, gone, save_bert
from serve.groups.forked_groups import forked
from serve.saved_runs import text_run

import shoal
from shoal.cli.main import main
from shoal.errors import UserError
from shoal.run.run import Run
from shoal.serve.frames import encode
from shoal.serve.groups.agents import Agents, Form, Hello, ToAgent, to_agents
from shoal.serve.groups.broker import Broker, Host, Leave, Load, ToHost, to_hosts
from shoal.serve.intake.registry import open_intake
from shoal.serve.payloads import Outputs
from shoal.serve.target import load
from shoal.serve.weights import share_weights
from shoal.train import checkpoint

Start = Callable[..., Served]
TEXTS = ["a b c", "d e f g", "h", "red ?"]


def variables(rank: int, port: int, world: int = 2) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


OtherHost = Callable[..., AbstractContextManager[Program]]


@pytest.fixture
def other_host(warm: Source) -> OtherHost:
    @contextmanager
    def run(port: int, *arguments: str | Path) -> Iterator[Program]:
        command = [sys.executable, "-m", "shoal", "serve", *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables(1, port)}
        process = Program(command, source=warm, env=env)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    return run


class Asking:
    """Asks for the same texts until the block is left; every answer is kept, and every error."""

    def __init__(self, server: Served) -> None:
        self.server, self._stop = server, threading.Event()
        self.told: list[Any] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def _ask(self) -> None:
        connection = HTTPConnection(self.server.host, int(self.server.port), timeout=120)
        try:
            while not self._stop.is_set():
                connection.request("POST", "/predict", json.dumps({"text": TEXTS}))
                answer = connection.getresponse()
                self.told.append((answer.status, json.loads(answer.read()).get("predictions")))
        except BaseException as error:
            self.told.append(error)
        finally:
            connection.close()

    def more(self, count: int, within_s: float = 120.0) -> None:
        wanted, end = len(self.told) + count, time.monotonic() + within_s
        while len(self.told) < wanted:
            assert time.monotonic() < end, "no more answers"
            time.sleep(0.01)

    def __enter__(self) -> "Asking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def of_one_process(folder: Path) -> list[Any]:
    loaded = load(str(folder))
    share_weights(loaded.model)  # they then lie as in a server: a matmul may sum in another order where they do not
    intake = open_intake(loaded.facts, 1)
    assert intake is not None
    samples = intake.read({"text": TEXTS})
    with forked(loaded.model, loaded.facts, {}, batch=1) as alone:
        ids = [alone.send(inputs) for sample in samples for inputs in intake.inputs(sample)]
        told = alone.answers(ids)
    outputs = [msgspec.msgpack.decode(told[id].payload, type=Outputs) for id in ids]  # type: ignore[union-attr]
    return [intake.prediction(sample, [one]) for sample, one in zip(samples, outputs, strict=True)]


@pytest.mark.parametrize(
    "whole",
    [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.soak)],
    ids=["in short", "whole"],
)
def test_two_hosts_answer_as_one_process_whoever_of_them_is_killed_and_take_other_weights(
    served: Start, other_host: OtherHost, tmp_path: Path, whole: bool
) -> None:
    """Two groups over both hosts, under load all the time."""
    folder = save_bert(tmp_path / "bert", "classification", classes=3)
    newer = Path(shutil.copytree(folder, tmp_path / "newer"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in weights.items()}, newer / "model.safetensors")
    right, then = ((200, of_one_process(each)) for each in (folder, newer))
    assert right != then
    keys = tmp_path / "keys"
    keys.write_text("the-admins-own-key\n")
    port = unused_port()
    arguments = (folder, "--mesh", "pipe=2", "--batch", "1", "--timeout-s", "120", "--replicas", "2")
    arguments += ("--admin-keys", keys)

    def reload(target: Path | str) -> int:
        connection = HTTPConnection(server.host, int(server.port), timeout=300)
        headers = {"Authorization": "Bearer the-admins-own-key"}
        connection.request("POST", "/v1/reload", json.dumps({"target": str(target)}), headers)
        status = connection.getresponse().status
        connection.close()
        return status

    with other_host(port, *arguments) as other:
        server = served(*arguments, **variables(0, port))
        with Asking(server) as asking:
            asking.more(5)
            for host in (1, 0):
                leaders, (_, *members) = server.replicas(), children(other.pid)
                os.kill((leaders, members)[host][0], signal.SIGKILL)
                groups = [*leaders, *members]
                while len(left := [pid for pid in groups if pid in (*server.replicas(), *children(other.pid))]) > 2:
                    asking.more(1)
                assert len(left) == 2, "one group ends, on both hosts"
                asking.more(5)
            os.kill(server.pids()[0], signal.SIGKILL)  # the parent, which the other host has found
            asking.more(5)
            if whole:
                os.kill(children(other.pid)[0], signal.SIGKILL)  # the other host's agent, and its processes with it
                asking.more(5)
            other.kill()  # all of the other host
            other.wait()
            with other_host(port, *arguments) as back:
                asking.more(5)
                if whole:
                    assert reload("nowhere") == 422
                assert [one for one in asking.told if one != right] == [], "to the bit, and no error"
                assert reload(newer) == 200
                from_here = len(asking.told)
                asking.more(5)
                asking._stop.set()
                for thread in asking._threads:
                    thread.join()
                pids = [back.pid, *children(back.pid), *server.pids()]
                code, _ = server.end()
                assert (code, back.wait(60)) == (0, 0), "the server's end is that of all ranks"
                assert gone(pids)
    assert [one for one in asking.told if one not in (right, then)] == [], "of one version each, and no error"
    assert len([one for one in asking.told[from_here:] if one != then]) <= 2, "those that were under way"


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> int:
    port = unused_port()
    for name, value in variables(0, port).items():
        monkeypatch.setenv(name, value)
    return port


def look(agents: Agents, until: Callable[[], object]) -> None:
    """What comes, until this is so; fails where nothing comes."""
    while not until():
        ready, _, _ = select.select(list(agents.sockets()), [], [], 10.0)
        assert ready, "nothing comes"
        agents.look({each.fileno() for each in ready})


def sent_away(agents: Agents, connection: socket.socket) -> bytes:
    """All that it hears before it is hung up on."""
    heard = b""
    connection.setblocking(False)
    while True:
        try:
            data = connection.recv(1 << 16)
            if not data:
                return heard
            heard += data
        except BlockingIOError:
            look(agents, lambda: select.select([connection], [], [], 0)[0])


def said(connection: socket.socket) -> list[ToAgent]:
    return to_agents().feed(connection.recv(1 << 16))


def test_agents_with_another_model_or_another_language_are_sent_away(of_two: int) -> None:
    events: list[Any] = []
    agents = Agents(2, lambda: events.append("all here"), events.append, events.append)
    agents.model = "a model"
    with socket.create_connection(("127.0.0.1", agents.port)) as other:
        other.sendall(encode([Hello(1, "another model")]))
        (leave,) = to_agents().feed(sent_away(agents, other))
        assert "another model" in leave.why  # type: ignore[union-attr]
    with socket.create_connection(("127.0.0.1", agents.port)) as noise:
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sent_away(agents, noise) == b""
    assert "another model" in events.pop()
    assert (events, agents.missing) == ([], [1])
    with socket.create_connection(("127.0.0.1", agents.port)) as one:
        one.sendall(encode([Hello(1, "a model")]))
        look(agents, lambda: not agents.missing)
        with socket.create_connection(("127.0.0.1", agents.port)) as twin:
            twin.sendall(encode([Hello(1, "a model")]))
            (leave,) = to_agents().feed(sent_away(agents, twin))
            assert "is there already" in leave.why  # type: ignore[union-attr]
        agents.tell(Form(7, 1234))
        assert said(one) == [Form(7, 1234)]
    look(agents, lambda: agents.missing)
    assert events == ["all here", None], "an agent that has gone takes all groups with it"
    for each in list(agents.sockets()):
        each.close()
    assert msgspec.msgpack.decode(encode([Form(7, 1234)])[4:], type=list[ToAgent]) == [Form(7, 1234)]


def wanted(port: int, target: str) -> Load:
    return Load(port, target, "", "float32", "")


def looks(broker: Broker, until: Callable[[], object]) -> None:
    while not until():
        ready, _, _ = select.select(list(broker.sockets()), [], [], 10.0)
        assert ready, "nothing comes"
        broker.look({each.fileno() for each in ready})


def test_a_host_hears_of_every_parent_and_of_the_end_from_the_last_one(of_two: int) -> None:
    first, second = wanted(1, "old"), wanted(2, "new")
    old = Broker(first, 1)
    new = Broker(second, 1)
    assert (old.newer, new.newer) == (False, True)
    with socket.create_connection(("127.0.0.1", of_two)) as host:
        host.sendall(encode([Host(1)]))
        looks(old, lambda: old._parents and old._hosts)
        heard: list[ToHost] = []
        while len(heard) < 2:
            heard += to_hosts().feed(host.recv(1 << 16))
        assert sorted(heard, key=lambda load: load.port) == [first, second]  # type: ignore[union-attr]
        old.leave()
        assert host.recv(1) == b"", "it is to look for the next one"
    looks(new, lambda: not new.newer)
    with socket.create_connection(("127.0.0.1", of_two)) as host:
        host.sendall(encode([Host(1)]))
        looks(new, lambda: new._hosts)
        new.leave()
        assert to_hosts().feed(host.recv(1 << 16)) == [second, Leave("")]
    for each in list(new.sockets()):
        each.close()


def test_what_is_loaded_is_said_by_nobody_on_another_host(of_two: int) -> None:
    broker = Broker(wanted(1, "ours"), 1)
    with socket.create_connection(("127.0.0.1", of_two), source_address=("127.0.0.2", 0)) as stranger:
        stranger.sendall(encode([wanted(2, "theirs"), Host(1)]))
        looks(broker, lambda: broker._hosts)
        assert to_hosts().feed(stranger.recv(1 << 16)) == [wanted(1, "ours")]
    for each in list(broker.sockets()):
        each.close()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--mesh", "pipe=3"], "2 ranks were started and --mesh has 3 places"),
        (["--mesh", "tensor=4"], "start one rank for each"),
    ],
)
def test_what_is_not_served_over_several_hosts_is_refused_in_one_line(
    of_two: int, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert main(["serve", "anything", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert why in line


def test_a_server_beside_a_program_is_not_spread_over_hosts(of_two: int) -> None:
    with pytest.raises(UserError, match="by the verb"):
        shoal.serve("anything")


@pytest.mark.slow
def test_two_hosts_follow_a_run_to_the_same_checkpoint(served: Start, other_host: OtherHost, tmp_path: Path) -> None:
    run = Run.find(text_run(tmp_path))
    port = unused_port()
    arguments = (run.path, "--mesh", "pipe=2", "--follow")
    with other_host(port, *arguments) as other:
        server = served(*arguments, **variables(0, port))
        before = server.post("/predict", {"text": "line 1"})[1]
        held = checkpoint.newest(run.checkpoints)[0]
        assert held is not None
        turned = {n: -t if n == "model/classifier.weight" else torch.as_tensor(t) for n, t in held.tensors.items()}
        checkpoint.save(checkpoint.Checkpoint(turned, {"step": 2}), run.checkpoints)
        assert server.metric_reaches("shoal_reloads_total", 1, within_s=120)
        assert server.post("/predict", {"text": "line 1"})[1] != before
        (version,) = json.loads(server.get("/v1/models")[1])["data"][0]["versions"]
        assert version["source"].endswith("at step 2")
        assert server.end()[0] == 0
        assert other.wait(60) == 0, "the server's end is that of all ranks"
