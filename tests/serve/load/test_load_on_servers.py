"""Client processes against servers: one that does what the test says, and Shoal's own."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve.generation.tiny_gpt import save_gpt
from serve.served_models import FAULT, HERE

import shoal
from shoal.cli.main import main
from shoal.errors import UserError
from shoal.serve.load.arrivals import Arrival
from shoal.serve.load.figures import figures
from shoal.serve.load.processes import Asked, send
from shoal.serve.load.subject import Bare

STALL_S = 0.6


class Stalling:
    """Answers at once, but for the ``nth`` request: from it on, all answers come ``STALL_S`` later. Then no more."""

    def __init__(self, nth: int) -> None:
        self.nth, self.seen, self.until = nth, 0, 0.0
        self.port = 0
        self.up = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    async def _main(self) -> None:
        self.loop, self.leave = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.up.set()
        await self.leave.wait()
        server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
                self.seen += 1
                if self.seen == self.nth:
                    self.until = time.monotonic() + STALL_S
                await asyncio.sleep(max(0.0, self.until - time.monotonic()))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    def __enter__(self) -> "Stalling":
        self.thread.start()
        self.up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.leave.set)
        self.thread.join()


def test_a_stall_is_seen_by_all_who_would_have_asked_meanwhile() -> None:
    slow_s = 0.5 * STALL_S
    with Stalling(nth=50) as server:
        asked = Asked("127.0.0.1", server.port, "/x", ["{}"])
        arrivals = [Arrival(0.01 * i, 0) for i in range(150)]
        seen = send(asked, seconds=1.5, arrivals=arrivals, connections=4)  # fewer than wait: who waits here counts too
    assert len(seen.samples) == 150
    assert {sample.status for sample in seen.samples} == {200}
    slow = [sample for sample in seen.samples if sample.end - sample.due > slow_s]
    assert len(slow) >= 25, "one in ten milliseconds was due in the first half of the stall"
    with Stalling(nth=50) as server:
        asked = Asked("127.0.0.1", server.port, "/x", ["{}"])
        closed = send(asked, seconds=1.5, clients=1)
    slow = [sample for sample in closed.samples if sample.end - sample.due > slow_s]
    assert 1 <= len(slow) <= 3, "a closed loop asks nothing meanwhile: that is what it cannot tell"


def test_what_is_never_answered_is_no_answer_and_nobody_waits_for_it_for_ever() -> None:
    with Stalling(nth=1) as server:
        asked = Asked("127.0.0.1", server.port, "/x", ["{}"])
        seen = send(asked, seconds=0.1, clients=2, patience_s=0.1)
    assert {sample.status for sample in seen.samples} == {0}
    told = figures(seen, 0.0, 1.0, open_loop=False)
    assert (told["ok"], told["failed"]) == (0, 2)
    nobody = send(Asked("127.0.0.1", server.port, "/x", ["{}"]), seconds=0.1, arrivals=[Arrival(0.0, 0)])
    assert [sample.status for sample in nobody.samples] == [0], "nobody listens there any more"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with shoal.serve(str(save_gpt(tmp_path_factory.mktemp("gpt") / "tiny"))) as server:
        yield server.url


def test_of_streams_the_first_token_and_the_gaps_are_told(
    language_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--clients", "2", "--processes", "2", "--seconds", "0.5", "--warm-s", "0", "--json"]
    assert main(["bench", "serve", language_model, *load]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = told["rows"]
    assert told["path"] == "/v1/completions"
    assert row["failed"] == 0
    assert row["tokens_a_second"] * row["seconds"] == 64 * row["ok"], "as many as were asked for, by the server's usage"
    assert 0 < row["first_ms"]["p50"] <= row["ms"]["p50"]
    assert row["gap_ms"]["p50"] > 0


def test_a_target_is_served_for_the_time_being_with_its_bare_limit_beside_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{Path(shoal.__file__).parents[1]}")
    monkeypatch.setattr("shoal.serve.load.measure.BARE_S", 0.1)
    (tmp_path / "trace").write_text('{"at": 0.0, "body": {"input": [[1.0, 2.0]]}}\n' * 5)
    load = ["--clients", "2", "--rates", "20", "--trace", str(tmp_path / "trace"), "--seconds", "0.4", "--warm-s", "0"]
    plot = ["--plot", str(tmp_path / "load.svg"), "--serve", "batch=4"]
    assert main(["bench", "serve", "served_models:scripted", *load, *plot]) == 0
    said = capsys.readouterr().out
    for name in ("2 clients", "open, 20/s", "trace", "bare model, 1 at a time", "bare model, 4 at a time", "% of the"):
        assert name in said
    drawn = (tmp_path / "load.svg").read_text()
    assert drawn.count("<circle") >= 20
    assert "open, 20/s" in drawn
    assert "p99.9" in drawn


def test_a_body_that_the_bare_model_cannot_use_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{Path(shoal.__file__).parents[1]}")
    said = {
        "[1]": "must be a JSON object",
        '{"text": "a"}': "one of the fields 'input', 'inputs'",
        f'{{"input": [[{FAULT}, 0.0]]}}': "RuntimeError: a fault of the model",
    }
    for number, (body, why) in enumerate(said.items()):
        (tmp_path / f"{number}").write_text(body)
        bare = Bare("served_models:scripted", "float32", "", 1, str(tmp_path / f"{number}"))
        try:
            with pytest.raises(UserError, match=why):
                _ = bare.loaded(), bare.run(0.01, 1)
        finally:
            bare.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs a TARGET"),
        (["http://127.0.0.1:9"], "nobody answers at 127.0.0.1:9"),
        (["x", "--rates", "fast"], "numbers by commas"),
        (["x", "--rates", "0"], "greater than 0"),
        (["x", "--trace", "/nowhere"], "cannot read the trace"),
        (["x", "--quantile", "98"], "one of 50, 90, 99, 99.9"),
        (["x", "--serve", "batch"], "write NAME=VALUE"),
        (["x", "--ops", "barrier"], "--ops is for `shoal bench collectives`, not for serve"),
        (["x", "--plot", "a.png"], "ends in .svg"),
        (["no-such-target"], "no-such-target"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "serve", *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert said in errors[-1]
    assert [line for line in errors if line.startswith("shoal: ")] == errors[-1:]
