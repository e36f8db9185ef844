"""Folders and servers that the tests of serving share. Every server's processes must be gone after its test."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browser
from forked_programs import Program, Source, with_forks
from serve import served_models
from tokenizers import Tokenizer, models, pre_tokenizers

from shoal.models.bert import Bert, BertConfig, Head
from shoal.models.huggingface import save_folder

__all__ = ["browser", "folders", "scripted", "served", "served_afresh"]  # the fixtures
ADMIN = "the-admins-own-key"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *"abcdefgh", "who", "what", "is", "was", "red", "blue", "green", ".", "?"]


def word_tokenizer() -> str:
    """One token a word."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend.to_str()


def save_bert(folder: Path, head: Head, **options: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": 2, "width": 32, "vocab": len(WORDS), "context": 32}
    model = Bert(BertConfig(**{**sizes, **options}), head)
    for parameter in model.parameters():  # far enough from 0 that inputs matter
        parameter.data.mul_(5.0)
    save_folder(model, folder, word_tokenizer())
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Head], Path]:
    made: dict[str, Path] = {}

    def folder(head: Head) -> Path:
        if head not in made:
            made[head] = save_bert(tmp_path_factory.mktemp("served") / head, head, classes=3)
        return made[head]

    return folder


class Asking:
    """A server's address, and one way to ask it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host, self.port = url.rpartition("/")[2].split(":")

    def connection(self) -> HTTPConnection:
        return HTTPConnection(self.host, int(self.port), timeout=120)

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[HTTPResponse, bytes]:
        connection = self.connection()
        try:
            connection.request(method, path, body, {name.replace("_", "-"): v for name, v in headers.items()})
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        answer, told = self.raw("POST", path, json.dumps(body).encode(), **headers)
        return answer.status, json.loads(told)

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        answer, told = self.raw("GET", path, **headers)
        return answer.status, told

    def metric_reaches(self, name: str, value: float, within_s: float = 60.0) -> bool:
        """Model processes tell their figures once a second."""
        end = time.monotonic() + within_s
        while self.metric(name) < value and time.monotonic() < end:
            time.sleep(0.05)
        return self.metric(name) >= value

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.get("/metrics")[1].decode().splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert found, f"no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in found)


def children(pid: int) -> list[int]:
    """The living processes below this one, the parent of the model processes first."""
    below: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                below += [int(entry.name), *children(int(entry.name))]
    return below


def gone(pids: list[int], within_s: float = 5.0) -> bool:
    """Whether all of these have ended; waits for the kernel to end them."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        ended = bool(poll.poll(within_s * 1000))
        os.close(handle)
        if not ended:
            return False
    return True


@pytest.fixture(scope="session", autouse=True)
def parents_are_forked(warm: Source) -> Iterator[None]:
    """What servers in this process start has imported everything, too. That a server with interpreters of its own does
    the same, `scripted` shows, and what uses `served_afresh`."""
    with pytest.MonkeyPatch.context() as patch:
        for starter in map(import_module, ("shoal.serve.replicas", "shoal.serve.load.subject")):
            patch.setattr(starter, "subprocess", with_forks(starter, warm))
        yield


class Served(Asking):
    """``shoal serve`` as a process of its own."""

    def __init__(self, arguments: list[str], env: dict[str, str], start: Callable[..., Any] = subprocess.Popen) -> None:
        self.process = start(
            [sys.executable, "-m", "shoal", "serve", *arguments, "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([served_models.HERE, *filter(None, sys.path)]), **env},
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        self.told = json.loads(line)
        super().__init__(self.told["url"])

    def pids(self) -> list[int]:
        return children(self.process.pid)

    def replicas(self) -> list[int]:
        """The model processes: the children of the parent."""
        return self.pids()[1:]

    def processes_become(self, count: int, within_s: float = 60.0) -> bool:
        """The parents and the model processes."""
        end = time.monotonic() + within_s
        while len(self.pids()) != count and time.monotonic() < end:
            time.sleep(0.02)
        return len(self.pids()) == count

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """(exit code, stderr)"""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def served(warm: Source) -> Iterator[Callable[..., Served]]:
    """Starts servers, in forks; afterwards none of their processes may be left."""
    yield from _starting(partial(Program, source=warm))


@pytest.fixture
def served_afresh() -> Iterator[Callable[..., Served]]:
    """As `served`, with an interpreter of its own for each process that would have one."""
    yield from _starting(subprocess.Popen)


def _starting(program: Callable[..., Any]) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(*arguments: str | Path, **env: str) -> Served:
        made.append(Served([str(a) for a in arguments], env, program))
        return made[-1]

    yield start
    for one in made:
        below = one.pids()
        if one.process.poll() is None:
            one.end()
        assert gone(below), "processes outlived their server"


@pytest.fixture(scope="session")
def scripted() -> Iterator[Served]:
    """A server for all tests that leave it as it was. It is a process: a thread here would be forked with others."""
    server = Served(["serve.served_models:scripted", "--batch", "4", "--body-bytes", "100000"], {})
    below = server.pids()
    yield server
    server.end()
    assert gone(below), "processes outlived their server"
