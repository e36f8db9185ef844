"""Copies on another host: where they lie; and a step is put together from whatever is left, whole or not at all."""

import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.group import SocketGroup
from shoal.comm.heap import heap_file
from shoal.comm.mesh import Mesh, PeerLost
from shoal.comm.status import Reporter
from shoal.comm.wired import WiredGroup
from shoal.elastic.mirror import Mirror
from shoal.elastic.peer_copies import PeerCopies, keepers, replenish
from shoal.train.held_parts import HeldPart

ELEMENTS = 60
NEVER = -1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_no_copy_lies_on_the_host_of_its_original_and_all_take_their_part(homes):
    found = keepers(homes)
    if len(set(homes)) == 1:
        assert found == [None] * len(homes)
        return
    assert all(keeper is not None and homes[keeper] != home for keeper, home in zip(found, homes, strict=True))
    largest = max(homes.count(home) for home in homes)
    if all(homes.count(home) == largest for home in homes):
        assert max(found.count(rank) for rank in range(len(homes))) <= 2


class Hosts:
    """Memory of some hosts, and the workers of one epoch after the other: all that they do to it, one at a time."""

    def __init__(self, hosts: int) -> None:
        self.files = {host: heap_file() for host in range(hosts)}
        self.homes: list[int] = []
        self.mirrors: list[Mirror] = []
        self.copies: list[PeerCopies] = []
        self.epoch = 0
        self.epochs_groups: list[SocketGroup] = []
        self._sockets: list[socket.socket] = []

    def lose(self, host: int) -> None:
        """The memory too; another one comes, with nothing."""
        os.close(self.files[host])
        self.files[host] = heap_file()

    def close(self) -> None:
        self.hang_up()
        for file in self.files.values():
            os.close(file)

    def hang_up(self) -> None:
        for each in self._sockets:
            each.close()
        self._sockets.clear()

    def groups(self, homes: list[int]) -> list[SocketGroup]:
        self.hang_up()
        world = len(homes)
        rows: list[list[socket.socket | None]] = [[None] * world for _ in range(world)]
        for low in range(world):
            for high in range(low + 1, world):
                rows[low][high], rows[high][low] = pair = socket.socketpair()
                self._sockets += pair
        made = []
        for rank, row in enumerate(rows):
            report = Reporter(rank, 0, None)
            made.append(WiredGroup(rank, world, Mesh(rank, row, report), report, lambda _: None))
        self.epochs_groups = made
        return made

    def go_on(self, homes: list[int], servers: int = 0) -> int | None:
        """A new epoch, whose last ranks are servers; the step that it goes on from."""
        groups, self.homes, self.epoch = self.groups(homes), homes, self.epoch + 1
        self.mirrors = [Mirror(self.files[home]) for home in homes]
        found: list[Any] = [None] * len(homes)

        def act(rank: int) -> None:
            found[rank] = replenish(self.mirrors[rank], groups[rank], homes, NEVER)

        at_once(act, len(homes))
        assert len(set(found)) == 1, "all have found the same"
        step: int | None = found[0][0] if found[0] else None
        if step is None:
            for mirror in self.mirrors:
                mirror.clear()
        else:
            for file in self.files.values() if set(homes) == set(self.files) else [self.files[home] for home in homes]:
                check(file, step)
        self.copies = []
        for rank, mirror in enumerate(self.mirrors):
            copies = PeerCopies(mirror, groups[rank].split([range(len(homes))]), homes, servers=servers)
            begins = NEVER if step is None else step
            mirror.enter(rank, len(homes), begins, 0, epoch=self.epoch, wards=copies.wards, elsewhere=copies.elsewhere)
            self.copies.append(copies)
        return step

    def step(self, number: int, draw: random.Random | None = None, acts: int = 10**9) -> bool:
        """What all do after a step, in an order that is drawn; False when they came no further than so many acts."""
        written: dict[int, Any] = {}
        world = len(self.homes)

        def write(rank: int) -> None:
            written[rank] = self.mirrors[rank].write(number, held(rank, world, number), facts(number))

        todo: list[Callable[[int], None]] = [write, lambda rank: self.copies[rank].send(number, written[rank])]
        turns = [rank for rank in range(world) for _ in todo]
        if draw is not None:
            draw.shuffle(turns)
        done = [0] * world
        for count, rank in enumerate(turns):
            if count == acts:
                return False
            todo[done[rank]](rank)
            done[rank] += 1
        for count, copies in enumerate(self.copies, start=len(turns)):
            if count == acts:
                return False
            copies.take(number)
        return True


def at_once(act: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=act, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def held(rank: int, world: int, step: int) -> list[HeldPart]:
    """Each worker has its part of one tensor, which depends on the step."""
    cuts = [ELEMENTS * each // world for each in range(world + 1)]
    whole = torch.arange(ELEMENTS, dtype=torch.float32) + 1000 * step
    return [HeldPart("model/w", (ELEMENTS,), cuts[rank], whole[cuts[rank] : cuts[rank + 1]])]


def facts(step: int) -> dict[str, Any]:
    return {"step": step, "aliases": {}, "optimizer": {"groups": [], "values": {}}, "loop": {}}


def check(file: int, step: int) -> None:
    found = Mirror(file).read(step)
    assert torch.equal(found.tensors["model/w"], torch.arange(ELEMENTS, dtype=torch.float32) + 1000 * step)
    assert found.step == step


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.mark.parametrize("seed", [*range(15), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(15, 40))])
def test_whatever_host_is_lost_in_the_middle_of_whatever_step_no_more_than_that_step_is(stack, seed):
    draw = random.Random(seed)
    count = draw.randrange(2, 5)
    hosts = Hosts(count)
    stack.callback(hosts.close)
    assert hosts.go_on([draw.randrange(count) for _ in range(5)] + list(range(count))) is None
    number = 0
    for _ in range(4):
        for _ in range(draw.randrange(1, 4)):
            number += 1
            assert hosts.step(number, draw)
        acts = draw.randrange(3 * len(hosts.homes))
        assert not hosts.step(number + 1, draw, acts)
        lost = draw.randrange(count)
        alone = set(hosts.homes) == {lost}  # all lived on that host, and nobody could have kept a copy
        hosts.lose(lost)
        comes_back = draw.random() < 0.5
        homes = [draw.randrange(count) for _ in range(draw.randrange(1, 4))] + list(range(count))
        if not comes_back and not alone:
            homes = [home for home in homes if home != lost]
        draw.shuffle(homes)
        step = hosts.go_on(homes)
        assert step in ((None,) if alone else (number, number + 1)), f"seed {seed}: all had ended step {number}"
        number = step or 0


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(8, 20))])
def test_of_two_hosts_that_are_lost_at_once_nothing_half_written_is_taken_for_a_step(stack, seed):
    draw = random.Random(seed)
    hosts = Hosts(4)
    stack.callback(hosts.close)
    hosts.go_on(list(range(4)))
    for number in range(1, 4):
        assert hosts.step(number, draw)
    hosts.step(4, draw, draw.randrange(12))
    for lost in draw.sample(range(4), 2):
        hosts.lose(lost)
    step = hosts.go_on(list(range(4)))  # which looks at every bit of what it has found
    assert step is None or step >= 2


def test_a_copy_on_the_same_host_would_be_lost_with_it(stack, monkeypatch):
    """The tests above would notice a placement that is wrong."""
    monkeypatch.setattr("shoal.elastic.peer_copies.keepers", lambda homes: [None] * len(homes))
    hosts = Hosts(3)
    stack.callback(hosts.close)
    hosts.go_on([0, 1, 2])
    assert hosts.step(1)
    hosts.lose(1)
    assert hosts.go_on([0, 1, 2]) is None


def test_an_update_that_a_server_answers_for_is_not_lost_with_its_host(stack):
    hosts = Hosts(3)
    stack.callback(hosts.close)
    homes, server = [0, 1, 2], 2
    assert hosts.go_on(homes, servers=1) is None
    for step in (1, 2):
        for rank in range(3):
            copy = hosts.mirrors[rank].write(step, held(rank, 3, step), facts(step))
            hosts.copies[rank].send(step, copy)
        waiting = threading.Thread(target=hosts.copies[server].acknowledged, args=(step,))
        waiting.start()
        keeper = keepers(homes)[server]
        assert keeper is not None
        hosts.copies[keeper].take(step)  # and no other worker has taken anything
        waiting.join()
        if step == 1:
            for rank in {0, 1, 2} - {keeper}:
                hosts.copies[rank].take(step)
    hosts.lose(server)
    assert hosts.go_on([0, 1]) == 2


def test_a_server_whose_keeper_goes_without_its_copy_answers_for_nothing(stack):
    hosts = Hosts(3)
    stack.callback(hosts.close)
    hosts.go_on([0, 1, 2], servers=1)
    hosts.copies[2].send(1, hosts.mirrors[2].write(1, held(2, 3, 1), facts(1)))
    keeper = keepers([0, 1, 2])[2]
    hosts.epochs_groups[keeper].mesh.close()
    with pytest.raises(PeerLost):
        hosts.copies[2].acknowledged(1)
