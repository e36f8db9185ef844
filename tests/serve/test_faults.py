"""What dies costs no client an answer, except the one that killed it; and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve.conftest import Asking, Served, children, gone
from serve.served_models import HANG, HERE, POISON, SLOW

Start = Callable[..., Served]
PATIENT = ("--timeout-s", "600")  # nobody is refused because those who were killed are slow to come back


class Load:
    """Clients that ask without a pause until the block is left; every answer is kept."""

    def __init__(self, asking: Asking, clients: int = 8) -> None:
        self.asking = asking
        self.answers: list[tuple[int, Any]] = []
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(float(i),)) for i in range(clients)]

    def _ask(self, number: float) -> None:
        connection = self.asking.connection()
        try:
            while not self._stop.is_set():
                connection.request("POST", "/predict", json.dumps({"input": [[number, 1.0]]}))
                answer = connection.getresponse()
                told = json.loads(answer.read())
                right = told.get("predictions") == [{"output": [[3 * number, 3.0]]}]
                self.answers.append((answer.status, right))
        except BaseException as error:
            self.errors.append(error)
        finally:
            connection.close()

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def reaches(self, count: int, within_s: float = 120.0) -> None:
        end = time.monotonic() + within_s
        while len(self.answers) < count and not self.errors:
            assert time.monotonic() < end, f"{len(self.answers)} answers, not {count}"
            time.sleep(0.01)

    def more(self, count: int) -> None:
        self.reaches(len(self.answers) + count)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_replicas_and_their_parent_are_killed_under_load_and_no_client_sees_an_error(served_afresh: Start) -> None:
    server = served_afresh("serve.served_models:scripted", "--replicas", "2", "--batch", "4", *PATIENT)
    assert server.processes_become(3)
    with Load(server) as load:
        load.reaches(50)
        for _ in range(3):
            killed = server.replicas()[:1]
            os.kill(killed[0], signal.SIGKILL)
            assert gone(killed)
            load.more(50)
            assert server.processes_become(3), "another one has come in its place"
        killed = server.pids()
        os.kill(killed[0], signal.SIGKILL)  # the parent, and its children with it
        assert gone(killed)
        load.more(50)
        assert server.processes_become(3)
        load.more(50)
    assert not load.errors
    assert set(load.answers) == {(200, True)}
    assert server.metric_reaches("shoal_replicas_lost_total", 5)
    assert server.metric_reaches("shoal_replicas", 2)


def test_a_request_that_crashes_the_process_fails_alone(served: Start) -> None:
    server = served("serve.served_models:scripted", "--batch", "4")
    with Load(server) as load:
        load.reaches(20)
        status, answer = server.post("/predict", {"input": [[POISON, 0.0]]})
        load.more(20)
    assert status == 500
    assert "died each of the 3 times" in answer["error"]["message"]
    assert not load.errors
    assert set(load.answers) == {(200, True)}


def test_a_process_that_hangs_is_replaced_and_others_are_answered(served: Start) -> None:
    server = served("serve.served_models:scripted", "--hang-s", "0.5", "--replicas", "2")
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(server.post, "/predict", {"input": [[HANG, 0.0]]})
        for _ in range(20):
            assert server.post("/predict", {"input": [[1.0, 1.0]]})[0] == 200
        assert hanging.result()[0] == 500


def test_who_leaves_before_the_answer_makes_no_work(served: Start) -> None:
    server = served("serve.served_models:scripted", "--batch", "1")
    assert server.processes_become(2)
    (model,) = server.replicas()
    os.kill(model, signal.SIGSTOP)  # nothing is done before all have left
    leaving = [server.connection() for _ in range(12)]
    for connection in leaving:
        connection.request("POST", "/predict", json.dumps({"input": [[1.0, 0.0]]}))
    assert server.metric_reaches("shoal_requests_open", 12)
    for connection in leaving:
        connection.close()
    assert server.metric_reaches("shoal_cancelled_total", 12)
    os.kill(model, signal.SIGCONT)
    assert server.post("/predict", {"input": [[1.0, 1.0]]})[0] == 200
    assert server.metric_reaches("shoal_rows_total", 1)
    assert server.metric("shoal_rows_total") <= 3, "of the twelve only what had reached the process"


def test_too_many_requests_are_refused_at_once_with_a_time_to_come_back(served: Start) -> None:
    server = served("serve.served_models:scripted", "--batch", "1", "--queue", "2")

    def ask(_: int) -> tuple[int, str | None, float]:
        begun = time.monotonic()
        answer, _ = server.raw("POST", "/predict", json.dumps({"input": [[SLOW, 0.0]]}).encode())
        return answer.status, answer.headers["Retry-After"], time.monotonic() - begun

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    refused = [(after, spent) for status, after, spent in answers if status == 429]
    assert len([status for status, _, _ in answers if status == 200]) + len(refused) == 12
    assert refused
    assert all(after is not None and int(after) >= 1 for after, _ in refused)


def test_a_request_that_takes_longer_than_its_limit_gets_504(served: Start) -> None:
    server = served("serve.served_models:scripted", "--batch", "1", "--timeout-s", "1.0")

    def ask(_: int) -> int:
        return server.post("/predict", {"input": [[SLOW, 0.0]]})[0]

    with ThreadPoolExecutor(8) as pool:  # 0.3 s each, one after the other
        statuses = sorted(pool.map(ask, range(8)))
    assert statuses[0] == 200
    assert statuses[-1] == 504


def test_on_sigterm_open_requests_are_answered_and_nothing_is_left(served: Start) -> None:
    server = served("serve.served_models:scripted", "--batch", "1", "--replicas", "2")
    assert server.processes_become(3)
    pids = server.pids()
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.post, "/predict", {"input": [[SLOW, float(i)]]}) for i in range(6)]
        end = time.monotonic() + 10
        while server.metric("shoal_requests_open") < 6 and time.monotonic() < end:
            time.sleep(0.01)
        code, errors = server.end()
        assert [future.result()[0] for future in asked] == [200] * 6
    assert (code, errors) == (0, "")
    assert gone(pids)
    with pytest.raises(ConnectionRefusedError):
        server.get("/health/live")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_server_that_is_interrupted_or_killed(served: Start, number: int) -> None:
    server = served("serve.served_models:scripted", "--replicas", "2")
    assert server.processes_become(3)
    pids = server.pids()
    code, _ = server.end(number)
    assert code == (130 if number == signal.SIGINT else -9)
    assert gone(pids)


def test_a_signal_while_the_model_is_loaded_ends_the_server() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, *filter(None, sys.path)])}
    command = [sys.executable, "-m", "shoal", "serve", "serve.served_models:scripted", "--port", "0"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 20
    while not children(process.pid) and time.monotonic() < end:
        time.sleep(0.01)
    pids = children(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert gone(pids)


def proportional(pid: int) -> int:
    """Bytes of a process's memory; what n processes map counts one n-th."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def test_a_second_and_third_process_make_no_copy_of_the_weights(served_afresh: Start) -> None:
    server = served_afresh("serve.served_models:large", "--replicas", "3", "--batch", "1")
    body = {"input": np.ones((48, 1024)).tolist()}  # so many batches that every process has some
    assert server.post("/predict", body)[0] == 200
    assert server.metric_reaches("shoal_rows_total", 48)
    figures = server.get("/metrics")[1].decode()
    assert all(f'shoal_rows_total{{replica="{number}"}}' in figures for number in range(3))
    http, *models = (Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, *server.pids()))
    assert "libtorch" not in http, "the HTTP process has no use for torch"
    assert all("libtorch" in maps and "shoal-weights" in maps for maps in models)
    weights = 16 * 1024 * 1024 * 4
    assert sum(proportional(pid) for pid in server.pids()) < 2 * weights + 190e6, "torch itself takes 190 MB at most"


def test_a_model_that_writes_to_the_shared_weights_dies_and_the_weights_stay(served: Start) -> None:
    server = served("serve.served_models:writes")
    assert server.post("/predict", {"input": [[1.0]]})[0] == 500
    assert server.get("/health/ready")[0] in (200, 503)


def test_an_idle_server_uses_no_processor(served: Start) -> None:
    server = served("serve.served_models:scripted", "--replicas", "2")
    server.post("/predict", {"input": [[1.0, 1.0]]})
    pids = [server.process.pid, *server.pids()]
    time.sleep(1.5)  # the last figures are told within a second

    def switches() -> int:
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
        return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if "ctxt_switches" in line)

    before = switches()
    time.sleep(1.0)
    assert switches() - before <= 5, "nothing wakes up"
