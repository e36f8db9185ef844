"""Requests of a served classifier while everything changes: newer weights come in, model processes are added, taken
away and killed. And how long a server that sleeps takes to answer.

    python bench/serve.py --upheaval

A small BERT answers, so that the time between two changes holds hundreds of requests. A request counts as failed unless
it is answered with 200. That no answer is of two versions is claimed by tests/serve/test_reload.py."""

import http.client
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.serve.load.processes import Asked, send

ADMIN = "the-key-of-this-bench"
CLIENTS = 64, 2  # in turns, so that model processes come and go
PIECE_S = 2.0


def make_versions(folder: Path, tokenizer: Path) -> list[Path]:
    """Two folders with one model in other weights."""
    import torch

    from shoal.models.bert import Bert, BertConfig
    from shoal.models.huggingface import save_folder

    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        sizes = {"layers": 2, "heads": 4, "width": 128, "vocab": 30522, "context": 128, "classes": 2}
        made.append(folder / f"version-{seed}")
        save_folder(Bert(BertConfig(**sizes), "classification"), made[-1], tokenizer.read_text())
    return made


def ask(port: str, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", int(port))
    told = None if body is None else json.dumps(body)
    connection.request(method, path, told, {"Authorization": f"Bearer {ADMIN}"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def metric(port: str, name: str) -> float:
    lines = ask(port, "GET", "/metrics")[1].decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


class Changes:
    """Goes round in a thread: other weights, a model process killed. Notes how many processes there were."""

    def __init__(self, port: str, pid: int, versions: list[Path]) -> None:
        self.port, self.pid, self.versions = port, pid, versions
        self.reloads = self.kills = 0
        self.wanted: set[float] = set()
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main)

    def _main(self) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            status, told = ask(self.port, "POST", "/v1/reload", {"target": str(self.versions[turn % 2])})
            self.reloads += status == 200
            self.failed += [] if status == 200 else [told.decode()]
            for _ in range(3):
                self.wanted.add(metric(self.port, "shoal_replicas_wanted"))
                self._stop.wait(0.2)
            self._kill()

    def _kill(self) -> None:
        """One that serves the newest weights."""
        replicas = children(children(self.pid)[-1])
        if replicas:
            os.kill(replicas[0], signal.SIGKILL)
            self.kills += 1

    def __enter__(self) -> "Changes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def upheaval(start: Callable[[list[str]], Any], versions: list[Path], keys: Path, text: str, total: int) -> dict:
    """``start`` gives a server, which has ``port``, ``process`` and ``close()``."""
    keys.write_text(ADMIN)
    scale = ["--min-replicas", "1", "--max-replicas", "3", "--calm-s", "0.5", "--batch", "8"]
    server = start([str(versions[0]), *scale, "--admin-keys", str(keys)])
    statuses: dict[str, int] = {}
    body = json.dumps({"text": text})
    asked = Asked("127.0.0.1", int(server.port), "/predict", [body])
    begun = time.perf_counter()
    try:
        with Changes(server.port, server.process.pid, versions) as changes:
            turn = 0
            while sum(statuses.values()) < total:
                seen = send(asked, seconds=PIECE_S, clients=CLIENTS[turn % 2])
                turn += 1
                for sample in seen.samples:
                    statuses[str(sample.status)] = statuses.get(str(sample.status), 0) + 1
        return {
            "asked": sum(statuses.values()),
            "failed": sum(count for status, count in statuses.items() if status != "200"),
            "statuses": statuses,
            "reloads": changes.reloads,
            "refused_reloads": changes.failed,
            "killed": changes.kills,
            "model_processes": [min(changes.wanted), max(changes.wanted)],
            "lost_as_told": metric(server.port, "shoal_replicas_lost_total"),
            "seconds": time.perf_counter() - begun,
        }
    finally:
        server.close()


def wakes(start: Callable[[list[str]], Any], folder: Path, body: Path, rounds: int) -> dict:
    """Seconds from a request to its answer where no model process is left, and the part of it that waking one takes."""
    server = start([str(folder), "--min-replicas", "0", "--max-replicas", "1", "--calm-s", "0.1"])
    answered, woken = [], []
    try:
        for _ in range(rounds):
            while metric(server.port, "shoal_replicas"):
                time.sleep(0.02)
            begun = time.perf_counter()
            status, _ = ask(server.port, "POST", "/predict", json.loads(body.read_text()))
            answered.append(time.perf_counter() - begun)
            assert status == 200
            woken.append(metric(server.port, "shoal_start_wake_seconds"))
        return {
            "answered_s": statistics.median(answered),
            "woken_s": statistics.median(woken),
            "all": list(zip(answered, woken, strict=True)),
        }
    finally:
        server.close()
