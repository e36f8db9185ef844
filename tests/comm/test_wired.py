"""The exchange over sockets between hosts: the bits of one worker, and nobody waits for a peer that has gone."""

import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from shoal.comm.arena import Arenas
from shoal.comm.distributed import DistributedExchange
from shoal.comm.exchange import Exchange, HeapExchange, Placement, Terms
from shoal.comm.group import HostGroup
from shoal.comm.heap import Heap, heap_file
from shoal.comm.layout import flat_layout
from shoal.comm.mesh import Mesh, PeerLost
from shoal.comm.stages import make_messages, sockets
from shoal.comm.status import Reporter
from shoal.comm.transport import make_exchange
from shoal.comm.wired import WiredGroup
from shoal.errors import UserError

SIZES, BUCKET = [70_000, 33, 40_000], 40_000  # several buckets
SHARDS = 8


def pairs(world: int) -> list[list[socket.socket | None]]:
    """Over TCP, as between hosts: row r is what rank r has."""
    rows: list[list[socket.socket | None]] = [[None] * world for _ in range(world)]
    with socket.create_server(("127.0.0.1", 0)) as door:
        for a in range(world):
            for b in range(a + 1, world):
                rows[a][b] = socket.create_connection(door.getsockname())
                rows[b][a] = door.accept()[0]
    return rows


def gradient(shard: int) -> torch.Tensor:
    return torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(shard))


def step(exchange: Exchange, placement: Placement) -> torch.Tensor:
    """One step: the mean of gradients that each shard's number makes, and the squares of its blocks."""
    passes, slots = (1,) * SHARDS, exchange.layout.slots
    exchange.begin(passes)
    exchange.claim()
    program = placement.accumulation(passes)
    more = program.buffers - len(exchange.partials)
    buffers = [*exchange.partials, *(torch.zeros(exchange.layout.elements) for _ in range(more))]
    for leaf, visit in zip(placement.ownership[placement.rank], program.passes, strict=True):
        flat = torch.zeros(exchange.layout.elements)
        for slot, piece in zip(slots, gradient(leaf).split(SIZES), strict=True):
            flat[slot.offset : slot.offset + slot.size] = piece
        buffers[visit.buffer].copy_(flat if visit.first else buffers[visit.buffer] + flat)
        for add in visit.then:
            buffers[add.into] += buffers[add.other]
    for _ in exchange.layout.buckets:
        exchange.post()
        exchange.advance()
    squares = exchange.finish()
    return torch.cat([*(exchange.result_of(slot) for slot in range(len(SIZES))), squares.sum().view(1).float()])


def terms(owned: Sequence[range], rank: int) -> Terms:
    layout = flat_layout(SIZES, [], len(owned), BUCKET)
    placement = Placement(owned, rank, fast=False)
    return Terms(layout, placement, (1,) * SHARDS, 2, lambda _: (8.0, 1.0), torch.float32, torch.device("cpu"))


def alone() -> torch.Tensor:
    report = Reporter(0, 0, None)
    memory = {"heap": Heap(heap_file()), "arenas": Arenas(0, [])}
    group = HostGroup(0, 1, Mesh(0, [None], report), report, lambda _: None, **memory)
    asked = terms([range(SHARDS)], 0)
    return step(HeapExchange(group, asked), asked.placement)


def together(owned: Sequence[range], act: Callable[[WiredGroup, Terms], Any]) -> list[Any]:
    """What each rank has come to: a value, or the PeerLost that it ended with."""
    found: list[Any] = [None] * len(owned)

    def run(rank: int, row: list[socket.socket | None]) -> None:
        report = Reporter(rank, 0, None)
        group = WiredGroup(rank, len(owned), Mesh(rank, row, report), report, lambda _: None)
        try:
            found[rank] = act(group, terms(owned, rank))
        except PeerLost as lost:
            found[rank] = lost
        finally:
            group.mesh.close()

    threads = [threading.Thread(target=run, args=each) for each in enumerate(pairs(len(owned)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("owned", [[range(3), range(3, 8)], [range(4), range(4, 5), range(5, 8)]])
def test_workers_of_several_hosts_have_the_bits_of_one_worker_at_every_step(owned):
    def two_steps(group: WiredGroup, asked: Terms) -> list[torch.Tensor]:
        exchange = make_exchange(group, asked)
        assert isinstance(exchange, DistributedExchange)
        return [step(exchange, asked.placement) for _ in range(2)]

    wanted = alone()
    for rows in together(owned, two_steps):
        assert all(torch.equal(row, wanted) for row in rows)


def test_whoever_waits_for_a_worker_that_has_gone_is_told_at_once():
    def one_leaves(group: WiredGroup, asked: Terms) -> torch.Tensor:
        exchange = make_exchange(group, asked)
        step(exchange, asked.placement)
        if group.rank == 1:
            raise PeerLost("on purpose")
        return step(exchange, asked.placement)

    found = together([range(3), range(3, 6), range(6, 8)], one_leaves)
    assert all(isinstance(each, PeerLost) for each in found)


def test_an_agent_that_shuts_its_own_handle_wakes_the_worker():
    (_, mine), (theirs, _) = pairs(2)
    assert mine is not None
    assert theirs is not None
    mesh = Mesh(0, [None, mine], Reporter(0, 0, None))
    with mine.dup() as kept, theirs:
        waiting = threading.Timer(0.1, kept.shutdown, [socket.SHUT_RDWR])
        waiting.start()
        with pytest.raises(PeerLost):
            mesh.receive(1, 1, 1)
        waiting.join()
    mesh.close()


def test_gathers_of_a_part_are_apart_from_those_of_all():
    def gathers(group: WiredGroup, asked: Terms) -> tuple[list[bytes], list[bytes]]:
        part = group.split([[0, 2], [1]])
        return part.gather(b"%d" % group.rank), group.gather(b"%d" % group.rank)

    found = together([range(3), range(3, 6), range(6, 8)], gathers)
    assert [row[0] for row in found] == [[b"0", b"2"], [b"1"], [b"0", b"2"]]
    assert all(row[1] == [b"0", b"1", b"2"] for row in found)


def test_what_it_does_not_carry_is_refused():
    def fast(group: WiredGroup, asked: Terms) -> str:
        with pytest.raises(UserError, match="train on processors"):
            make_exchange(group, replace(asked, placement=Placement(asked.placement.ownership, group.rank, fast=True)))
        return "refused"

    assert together([range(4), range(4, 8)], fast) == ["refused"] * 2


def test_what_a_stage_says_to_one_of_another_host_arrives_as_it_was_in_pieces_too(monkeypatch):
    monkeypatch.setattr(sockets, "PART", 10_000)
    values = {
        "large": torch.arange(50_000.0).view(100, 500).t(),
        "none": torch.empty(0, 3),
        "mask": torch.ones(3, dtype=torch.bool),
        "words": (1, None, "a"),
    }

    def both_ways(group: WiredGroup, asked: Terms) -> list[dict[str, Any]]:
        messages = make_messages(group, torch.device("cpu"))
        for number in range(3):  # before anybody asks for anything
            messages.send(1 - group.rank, (number, group.rank), values)
        found = [messages.receive(1 - group.rank, (number, 1 - group.rank)) for number in (1, 0, 2)]
        messages.settle()
        return found

    for rank in together([range(4), range(4, 8)], both_ways):
        for got in rank:
            assert got.pop("words") == values["words"]
            for name, tensor in got.items():
                assert torch.equal(tensor, values[name])
                assert tensor.stride() == values[name].stride(), "kernels choose their way by it"


def test_a_stage_that_waits_for_one_that_has_gone_is_told_at_once():
    def one_leaves(group: WiredGroup, asked: Terms) -> dict[str, Any]:
        messages = make_messages(group, torch.device("cpu"))
        if group.rank == 1:
            raise PeerLost("on purpose")
        return messages.receive(1, (0,))

    assert all(isinstance(each, PeerLost) for each in together([range(4), range(4, 8)], one_leaves))
