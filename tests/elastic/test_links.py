"""What agents say to each other: proved, checked, limited; and what they keep, torn at any byte."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.elastic import consensus as c
from shoal.elastic import fleet as f
from shoal.elastic import frames, links
from shoal.elastic import membership as m
from shoal.elastic.council import Propose
from shoal.elastic.hosts import shared_token
from shoal.elastic.links import Differs, Heard, Linked, Links, NotLinked, Pair, Refused
from shoal.elastic.network import free_addresses
from shoal.elastic.promises import Promises
from shoal.errors import UserError

ENTRIES = (c.Entry(1, c.Started(2)), c.Entry(2, f.Said(1, 7, 3, m.Left(1, 2, True))), c.Entry(2, c.Voters((0, 1))))
MESSAGES = [
    c.AskVote(3, 1, 4, 2, True),
    c.Append(1, 2, 3, 4, ENTRIES, 5, 1.5, None, 0.5),
    c.Appended(1, 2, True, 3, 1.0, 2.0),
    Propose(1, (f.Up(1, 2, "host"), f.Said(1, 2, 3, f.Failed(1, "why", True, "trace")))),
    frames.Paced(3, 0.25),
]


@pytest.fixture
def made() -> Iterator[Callable[..., list[Links]]]:
    opened: list[Links] = []

    def make(
        *, tokens: tuple[bytes, bytes] = (b"same", b"same"), jobs: tuple[str, str] = ("job", "job")
    ) -> list[Links]:
        addresses = free_addresses(2)
        opened.extend(Links(n, addresses, tokens[n], jobs[n]) for n in range(2))
        return opened

    yield make
    for one in opened:
        one.close()


def turn(ends: list[Links], until: Callable[[list[Any]], bool], limit_s: float = 5.0) -> list[Any]:
    """All news of both ends, until there is what is waited for."""
    news: list[Any] = []
    end = time.monotonic() + limit_s
    while not until(news):
        assert time.monotonic() < end, news
        for one in ends:
            news += one.turn()
    return news


def heard(news: list[Any]) -> list[Any]:
    return [each.message for each in news if isinstance(each, Heard)]


def test_what_one_says_the_other_one_hears_in_order(made):
    ends = made()
    turn(
        ends,
        lambda _: all(way.state == "open" for one in ends for way in one._ways.values()) and len(ends[0]._ways) == 1,
    )
    for message in MESSAGES:
        ends[0].send(1, message)
    assert heard(turn(ends, lambda news: len(heard(news)) == len(MESSAGES))) == MESSAGES


def test_who_does_not_know_the_token_is_not_heard(made):
    ends = made(tokens=(b"right", b"wrong"))
    begun = time.monotonic()
    news = turn(ends, lambda _: time.monotonic() - begun > 0.4)
    assert not news
    assert not any(way.state == "open" for one in ends for way in one._ways.values())


def test_who_was_started_for_another_job_is_named(made):
    news = turn(made(jobs=("job", "another")), lambda news: any(isinstance(each, Differs) for each in news))
    assert not heard(news)


def test_a_stranger_that_says_anything_is_sent_away_and_says_nothing_that_counts(made):
    ends = made()
    place = ends[0]._door.getsockname()
    strangers, news = [], []
    for _ in range(links.STRANGERS + 5):  # they say nothing at all
        strangers.append(socket.create_connection(place))
        news += ends[0].turn()
    assert sum(wire.state == "hello" for wire in ends[0]._wires) == links.STRANGERS
    for number, stranger in enumerate(strangers[: links.STRANGERS]):
        stranger.sendall(bytes([number]) * 2000)
    news += turn(ends[:1], lambda _: not any(wire.state == "hello" for wire in ends[0]._wires))
    assert not heard(news)
    for stranger in strangers:
        stranger.close()


def test_a_message_that_was_changed_on_its_way_ends_the_connection(made):
    ends = made()
    turn(
        ends,
        lambda _: all(way.state == "open" for one in ends for way in one._ways.values()) and len(ends[0]._ways) == 1,
    )
    way = ends[0]._ways[1]
    body = frames.encode(frames.Paced(1, 0.5))
    way.unsent += links._FRAME.pack(len(body), 1, bytes(16)) + body
    begun = time.monotonic()
    assert not heard(turn(ends, lambda _: time.monotonic() - begun > 0.3))


def test_a_process_that_has_ended_is_known_by_its_closed_door(made):
    ends = made()
    ends[1].close()
    news = turn(ends[:1], lambda news: Refused(1) in news)
    ends.pop()
    assert Refused(1) in news


def test_two_workers_get_the_two_ends_of_a_socket(made):
    ends, pair = made(), Pair(3, 0, 1)
    ends[0].dial(1, pair)
    news = turn(ends, lambda news: sum(isinstance(each, Linked) for each in news) == 2)
    left, right = (each.socket for each in news if isinstance(each, Linked))
    left.setblocking(True)
    right.setblocking(True)
    left.sendall(b"raw")
    assert right.recv(3) == b"raw"
    left.close()
    right.close()


def test_a_link_to_nobody_comes_to_nothing(made):
    ends = made()
    ends.pop().close()
    ends[0].dial(1, Pair(1, 0, 1))
    assert NotLinked(Pair(1, 0, 1)) in turn(ends, lambda news: any(isinstance(each, NotLinked) for each in news))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_comes_back_as_it_was(message):
    assert frames.decode(frames.encode(message)) == message


def test_a_message_that_is_too_large_is_not_read():
    with pytest.raises(frames.FrameError, match="the limit is"):
        frames.decode(b" " * (frames.LARGEST + 1))


def test_promises_are_kept_over_processes_and_torn_ones_were_never_made(tmp_path: Path):
    place = tmp_path / "agents" / "1.log"
    kept = Promises(place, 3)
    kept.keep(c.Keep(1, 2, 0, ENTRIES))
    whole = place.stat().st_size
    kept.keep(c.Keep(2, None, 1, (c.Entry(2, f.Up(1, 2, "x")),)))
    kept.close(forget=False)
    raw = place.read_bytes()
    for size in range(whole, len(raw), 7):
        place.write_bytes(raw[:size])
        again = Promises(place, 3)
        again.close(forget=False)
        assert (again.term, again.voted, tuple(again.log)) == (1, 2, ENTRIES)
    place.write_bytes(raw)
    again = Promises(place, 3)
    again.close(forget=True)
    assert (again.term, again.voted, again.log) == (2, None, [ENTRIES[0], c.Entry(2, f.Up(1, 2, "x"))])
    assert not place.parent.exists()


def test_promises_of_another_number_of_agents_are_refused(tmp_path: Path):
    Promises(tmp_path / "0.log", 3).close(forget=False)
    with pytest.raises(UserError, match="is of 3 agents, not of 5"):
        Promises(tmp_path / "0.log", 5)


def test_all_agents_of_a_run_have_one_token_that_nobody_else_can_read(tmp_path: Path):
    token = shared_token(tmp_path)
    assert shared_token(tmp_path) == token
    assert shared_token(tmp_path / "other") != token
    assert [path.name for path in (tmp_path / "agents").iterdir()] == ["token"]
    (tmp_path / "agents" / "token").chmod(0o644)
    with pytest.raises(UserError, match="can be read by others"):
        shared_token(tmp_path)
