"""Model processes come with the load and go without it, down to none; no request fails of it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve.conftest import Served, gone
from serve.served_models import SLOW
from serve.test_faults import Load

import shoal
from shoal.errors import UserError

Start = Callable[..., Served]
pytestmark = pytest.mark.slow


def test_a_server_that_nobody_asks_sleeps_and_the_first_request_wakes_it(served: Start) -> None:
    server = served("serve.served_models:scripted", "--min-replicas", "0", "--calm-s", "0.3")
    for i in range(3):
        assert server.processes_become(1), "it sleeps"
        assert server.get("/health/ready")[0] == 200, "asleep is not broken"
        status, answer = server.post("/predict", {"input": [[float(i), 1.0]]})
        assert (status, answer["predictions"]) == (200, [{"output": [[3.0 * i, 3.0]]}])
    assert server.metric("shoal_start_wake_seconds") > 0


def test_processes_follow_the_load_up_and_down_and_no_request_fails(served: Start) -> None:
    server = served("serve.served_models:scripted", "--max-replicas", "3", "--batch", "2", "--calm-s", "0.5")
    slow = json.dumps({"input": [[SLOW, 0.0]]}).encode()
    with Load(server, clients=2) as load, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(server.raw, "POST", "/predict", slow) for _ in range(24)]
        assert server.processes_become(4)
        assert {future.result()[0].status for future in asked} == {200}
        before = server.replicas()
        assert server.processes_become(2)
        load.more(20)
    assert len(gone_of(before)) == 2
    assert set(load.answers) == {(200, True)}
    assert not load.errors
    assert server.metric("shoal_replicas_lost_total") == 0, "who was told to go has not been lost"


def gone_of(pids: list[int]) -> list[int]:
    return [pid for pid in pids if gone([pid], within_s=0.0)]


def test_bounds_that_contradict_each_other_are_one_line() -> None:
    with pytest.raises(UserError, match="put them in order"):
        shoal.serve("x", min_replicas=3, replicas=2)
