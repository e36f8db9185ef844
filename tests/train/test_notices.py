"""A signal, a file or an address that says that the end is near: the run is saved after its step, and goes on later."""

import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from train.tiny_runs import recipe, splits

from shoal.errors import UserError
from shoal.train import notices
from shoal.train.api import train
from shoal.train.notices import Drain, Notice, drains, grace_of

DATA = splits("mlp", 101)
LONG = recipe("mlp", steps=400)


def at_step(step: int, act):
    done: list[int] = []

    def listen(event) -> None:
        if event["event"] == "committed" and event["step"] >= step and not done:
            done.append(step)
            act()

    return listen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_every_signal_that_announces_an_end_drains_the_run(run, number, capfd):
    ended = run(
        LONG, 2, data=DATA, notice=Notice(grace_s=30), progress=at_step(3, lambda: os.kill(os.getpid(), number))
    )
    assert ended["interrupted"]
    assert 3 <= ended["steps"] < 400
    assert ended["checkpoint"]
    said = capfd.readouterr().err
    assert f"{signal.Signals(number).name}: stopping after this step; once more to stop at once." in said
    assert "The 30 s of grace will do (expected: " in said


def test_a_file_that_appears_drains_the_run_which_goes_on_later_with_the_same_bits(run, tmp_path, monkeypatch):
    monkeypatch.setattr(notices, "LOOK_S", 0.002)
    made = recipe("mlp", steps=200)
    file = tmp_path / "notice"
    act = at_step(3, lambda: file.write_text("120"))
    ended = run(made, 2, data=DATA, notice=Notice(str(file)), progress=act)
    assert ended["interrupted"]
    assert ended["steps"] < 200
    again = run(made, 1, data=DATA, resume=ended["run_dir"])
    assert again["weights_sha256"] == run(made, 1, data=DATA)["weights_sha256"]


@pytest.fixture
def address() -> Iterator[tuple[str, list[str]]]:
    """An address of this machine, and what it says: 404 while that is nothing."""
    says: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if says else 404)
            self.end_headers()
            self.wfile.write("".join(says).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/spot", says
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_is_a_notice_once_it_answers(address, monkeypatch, capfd):
    monkeypatch.setattr(notices, "LOOK_S", 0.002)
    url, says = address
    assert Notice(url).look() is None
    assert Notice("http://127.0.0.1:1/nobody").look() is None
    asked = threading.Event()
    with drains(Notice(url)) as drain:
        drain.heard({"event": "committed", "seconds": 100.0})
        drain.reach(asked.set)
        says.append('{"action": "terminate", "time": "2000-01-01T00:00:00Z"}')
        assert asked.wait(30)
    assert drain.asked
    assert f"{url}: stopping after this step" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "grace"),
    [
        ("30", 30.0),
        (" 2.5\n", 2.5),
        ('{"action": "stop", "time": "1970-01-01T00:18:40Z"}', 120.0),
        ('{"action": "stop", "time": "1970-01-01T00:18:40"}', 120.0),
        ('{"time": "1969-01-01T00:00:00Z"}', 0.0),
        ("", 0.0),
        ("TRUE", 0.0),
        ("[1]", 0.0),
        ('{"time": "soon"}', 0.0),
        ("-5", 0.0),
    ],
)
def test_what_a_notice_says_of_the_time_that_is_left(text, grace):
    assert grace_of(text, now=1000.0) == grace


def test_a_grace_that_is_too_short_is_said():
    said: list[str] = []
    drain = Drain(Notice(grace_s=2.0), said.append)
    drain.heard({"event": "committed", "seconds": 1.5})
    drain.reach(lambda: None)
    drain.on_signal(signal.SIGUSR1, None)
    assert (
        "The 2 s of grace is short: a kill may cost the steps since the last checkpoint (expected: 4.50 s)" in said[0]
    )


def test_another_signal_is_no_second_one_but_the_same_and_ctrl_c_are():
    """A scheduler sends USR1, then TERM: that must not cost the checkpoint which is being written."""
    for second, ends in ((signal.SIGTERM, False), (signal.SIGUSR1, True), (signal.SIGINT, True)):
        asked: list[int] = []
        drain = Drain(Notice(), lambda line: None)
        drain.reach(lambda asked=asked: asked.append(1))
        drain.on_signal(signal.SIGUSR1, None)
        if ends:
            with pytest.raises(KeyboardInterrupt):
                drain.on_signal(second, None)
        else:
            drain.on_signal(second, None)
        assert asked == [1]


@pytest.mark.parametrize(("source", "grace"), [("ftp://host/x", 0.0), ("", -1.0)])
def test_a_source_that_is_none_is_refused(source, grace):
    with pytest.raises(UserError, match=r"--notice|--grace"):
        Notice(source, grace)


@pytest.mark.parametrize("notice", [Notice("/tmp/soon", 0.0), Notice("", 30.0)])
def test_a_notice_is_refused_under_torchrun_before_anything_is_spent(notice, monkeypatch, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--notice and --grace"):
        train(LONG, data=DATA, run_dir=tmp_path / "run", notice=notice)
    assert not (tmp_path / "run").exists()
