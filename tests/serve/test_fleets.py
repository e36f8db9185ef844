"""Versions of the weights come, are tried out and go: whoever waits for one that is taken away is told so, and no two
have one number. The model processes are made up."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shoal.errors import RunFailed, ShoalError
from shoal.serve import fleets
from shoal.serve.control import Ready
from shoal.serve.fleets import Fleets
from shoal.serve.http.messages import HttpError
from shoal.serve.options import ServeOptions

FACTS = {"name": "m", "task": "tensors", "source": "here"}


class MadeUp:
    """Model processes that have loaded at once; they come up when the test says so."""

    def __init__(self, options: ServeOptions, hear: Any, lost: Any, leaving: Any, numbers: Any) -> None:
        loop = asyncio.get_running_loop()
        self.options, self.numbers = options, numbers
        self.wanted = options.replicas
        self.links: dict[int, None] = {}
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.broken: asyncio.Future[ShoalError] = loop.create_future()
        self.has_ended = False

    def start(self) -> None:
        self.ready.set_result(Ready(FACTS, {}, 0))
        self.scale(self.wanted)

    def scale(self, wanted: int) -> None:
        self.wanted = wanted
        while len(self.links) < wanted:
            self.links[next(self.numbers)] = None

    def end(self) -> None:
        self.has_ended = True

    def wait(self) -> None:
        return


class World:
    def __init__(self, replicas: int = 1) -> None:
        self.up: set[int] = set()
        self.ended: list[int] = []
        self.fleets = Fleets(
            ServeOptions(target="t", replicas=replicas),
            lambda version, number, messages: None,
            lambda number: None,
            set,
            self.up.__contains__,
            self.ended.append,
            lambda: None,
        )

    def of(self, version: int) -> MadeUp:
        return self.fleets.of(version)  # type: ignore[return-value]

    def all_up(self, version: int) -> None:
        self.up |= set(self.of(version).links)
        self.fleets.came_up()

    async def canary(self, version: int) -> None:
        loading = asyncio.ensure_future(self.fleets.reload("other", 0.1))
        await turns()
        assert not loading.done(), "not before its processes can work"
        self.all_up(version)
        assert (await loading)["version"] == version


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[World], Coroutine[Any, Any, None]], int], None]:
    monkeypatch.setattr(fleets, "Replicas", MadeUp)

    def run(story: Callable[[World], Coroutine[Any, Any, None]], replicas: int) -> None:
        async def main() -> None:
            world = World(replicas)
            await world.fleets.start()
            world.all_up(0)
            await asyncio.wait_for(story(world), 60)

        asyncio.run(main())

    return run


Play = Callable[[Callable[[World], Coroutine[Any, Any, None]], int], None]


def test_who_promotes_a_canary_that_is_rolled_back_meanwhile_is_told_so(play: Play) -> None:
    async def story(world: World) -> None:
        await world.canary(1)
        promoting = asyncio.ensure_future(world.fleets.promote())  # it has one process, and 3 are wanted
        await turns()
        assert not promoting.done()
        await world.fleets.roll_back()
        with pytest.raises(HttpError, match="rolled back meanwhile") as told:
            await promoting
        assert told.value.status == 409
        assert (world.ended, world.fleets.versions.current) == ([1], 0)

    play(story, 3)


def test_who_promotes_a_canary_twice_is_told_twice(play: Play) -> None:
    async def story(world: World) -> None:
        await world.canary(1)
        both = [asyncio.ensure_future(world.fleets.promote()) for _ in range(2)]
        await turns()
        world.all_up(1)
        assert [told["version"] for told in await asyncio.gather(*both)] == [1, 1]
        assert (world.ended, world.fleets.answering()) == ([0], [{"version": 1, "source": "here", "share": 1.0}])

    play(story, 3)


def test_no_two_versions_have_one_number(play: Play) -> None:
    async def story(world: World) -> None:
        await world.canary(1)
        await world.fleets.roll_back()
        two = [asyncio.ensure_future(world.fleets.reload("other")) for _ in range(2)]
        await turns()
        with pytest.raises(HttpError, match="another reload"):
            await two[1]
        world.all_up(2)
        assert (await two[0])["version"] == 2
        assert world.ended == [1, 0]

    play(story, 1)


def test_a_canary_that_cannot_be_kept_alive_is_withdrawn(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    async def story(world: World) -> None:
        await world.canary(1)
        canary = world.of(1)
        promoting = asyncio.ensure_future(world.fleets.promote())
        await turns()
        canary.broken.set_result(RunFailed("they die as soon as they start."))
        with pytest.raises(HttpError, match="they die") as told:
            await promoting
        assert told.value.status == 422
        assert canary.has_ended
        assert not world.fleets.has_canary
        assert not world.fleets.broken.done(), "the others go on"
        assert {world.fleets.versions.begin() for _ in range(20)} == {0}
        await world.canary(2)  # the next one can come

    play(story, 2)
    assert "the canary is withdrawn: they die" in capsys.readouterr().err
