"""Who comes when as many requests are open as may be is refused before his request is read, and told when to come back.
The model process is made up."""

import asyncio
import json
from typing import Any

import msgspec
import numpy as np
import pytest

from shoal.serve.engine import Begun, Failed, FromEngine, Result
from shoal.serve.http.connection import Connection
from shoal.serve.http.routes import OPEN_PATHS, open_routes
from shoal.serve.http.server import HttpServer
from shoal.serve.intake.registry import open_intake
from shoal.serve.model import Model
from shoal.serve.options import ServeOptions
from shoal.serve.payloads import Outputs, array
from shoal.serve.service import Service

FACTS = {"name": "m", "task": "tensors", "source": "here", "parameters": 0, "dtype": "float32"}
TAKEN, NONSENSE = b'{"input": [[1.0]]}', b"\xff{"


class Client:
    """One connection, whose answers come without a socket."""

    def __init__(self, server: HttpServer) -> None:
        self.written = b""
        self.connection = Connection(server)
        self.connection.connection_made(self)  # type: ignore[arg-type]

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1)

    def write(self, data: bytes) -> None:
        self.written += data

    def ask(self, body: bytes) -> "Client":
        self.written = b""
        self.connection.data_received(b"POST /predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return self

    def status(self) -> int:
        """0: there is no answer yet."""
        return int(self.written.split(b" ")[1]) if self.written else 0


class World:
    def __init__(self, **options: Any) -> None:
        self.service = Service(ServeOptions(target="x", **options))
        self.service._fleets.model = Model(FACTS)
        self.hear(Begun(()))
        routes = open_routes(self.service, open_intake(FACTS, 32))
        self.server = HttpServer(self.service, self.service.options, routes, OPEN_PATHS)

    def hear(self, *messages: FromEngine) -> None:
        self.service._hear(0, 0, list(messages))

    def result(self, id: int) -> Result:
        return Result(id, msgspec.Raw(msgspec.msgpack.encode(Outputs({"output": array(np.ones((1, 1), np.float32))}))))


def test_who_is_refused_is_refused_unread_and_told_when_to_come_back() -> None:
    async def play() -> None:
        world = World(batch=1, queue=0)  # one at work, and one that waits
        taken = [Client(world.server).ask(TAKEN) for _ in range(2)]
        refused = Client(world.server).ask(NONSENSE)
        assert [one.status() for one in (*taken, refused)] == [0, 0, 429]
        assert b"Retry-After: 1\r\n" in refused.written
        world.hear(world.result(0), Failed(1, 500, "no"))
        assert [one.status() for one in taken] == [200, 500]
        assert json.loads(taken[0].written.rpartition(b"\r\n")[2])["predictions"] == [{"output": [[1.0]]}]
        assert refused.ask(NONSENSE).status() == 400
        text = world.service.metrics.text({})
        assert "shoal_refused_total 1" in text
        assert world.service._inside == 0

    asyncio.run(play())


@pytest.mark.parametrize(("took_s", "room"), [(0.01, 16), (0.05, 3), (1.0, 1)])
def test_who_could_not_be_answered_in_time_is_refused(
    took_s: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("shoal.serve.service.time.monotonic", lambda: clock[0])

    async def play() -> None:
        world = World(batch=8, queue=100, within_ms=200.0)
        first = Client(world.server).ask(TAKEN)
        world.hear(Begun((0,), clock[0]))
        clock[0] += took_s
        world.hear(world.result(0), Begun((), clock[0]))
        assert first.status() == 200
        await asyncio.sleep(0)  # the server looks at its sockets again
        asked = [Client(world.server).ask(TAKEN) for _ in range(40)]
        assert [one.status() for one in asked[:room]] == [0] * room
        assert [one.status() for one in asked[room:]] == [429] * (40 - room)

    asyncio.run(play())


def test_who_was_taken_and_cannot_be_answered_in_time_is_refused_and_told_when_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr("shoal.serve.service.time.monotonic", lambda: clock[0])

    async def play() -> None:
        world = World(batch=1, queue=0, within_ms=200.0)
        waits = Client(world.server).ask(TAKEN)
        clock[0] += 0.189
        world.service._look()
        assert waits.status() == 0
        clock[0] += 0.002
        world.service._look()
        assert waits.status() == 429
        dropped = Client(world.server).ask(TAKEN)
        world.hear(Failed(1, 504, "could not be answered before its time was over"))
        assert dropped.status() == 429
        assert all(b"Retry-After: 1\r\n" in one.written for one in (waits, dropped))

    asyncio.run(play())


def test_the_time_that_a_request_lies_in_its_socket_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("shoal.serve.service.time.monotonic", lambda: clock[0])

    async def play() -> None:
        world = World(batch=8, queue=100, within_ms=200.0)
        first = Client(world.server).ask(TAKEN)
        clock[0] += 0.18  # that the server was busy with others
        second = Client(world.server).ask(TAKEN)
        assert [first.status(), second.status()] == [0, 429]
        await asyncio.sleep(0)  # it looks at its sockets again
        assert second.ask(TAKEN).status() == 0

    asyncio.run(play())


def test_who_leaves_takes_the_request_along() -> None:
    async def play() -> None:
        world = World(batch=1, queue=0)
        leaves, stays = (Client(world.server).ask(TAKEN) for _ in range(2))
        leaves.connection.connection_lost(None)
        assert (world.service.metrics.cancelled, len(world.service._router)) == (1, 1)
        assert Client(world.server).ask(TAKEN).status() == 0, "there is room again"
        world.hear(world.result(0), world.result(1))
        assert (leaves.status(), stays.status()) == (0, 200)

    asyncio.run(play())
