"""Messages between stages, held to the same claims on one host and over torch.distributed."""

import gc
import os
from types import SimpleNamespace

import pytest
import torch

from shoal.comm.native import build
from shoal.comm.stages import make_messages
from shoal.comm.status import Phase
from shoal.errors import RunFailed

CPU = torch.device("cpu")


def content(number, rank):
    """Of another shape and type in every message; some of it larger than what goes along with the words."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    large = torch.randn(3 + number, 5000, generator=generator)
    return {
        "x": large.t() if number % 2 else large,
        "state": (large[:1, :3], None, number),
        "tokens": torch.arange(number, dtype=torch.int64),
        "mask": torch.ones(number, 2, dtype=torch.bool),
        "text": {"a": [0.5, "b"]},
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def both_ways(group, count):
    """Every worker sends to every other one before it asks for anything."""
    messages = make_messages(group, CPU)
    others = [rank for rank in range(group.world) if rank != group.rank]
    for number in range(count):
        for to in others:
            messages.send(to, (number, 7), content(number, group.rank))
    right = [
        same(messages.receive(origin, (number, 7)), content(number, origin))
        for number in range(count)
        for origin in others
    ]
    messages.settle()
    totals = group.counters.totals()
    sent = sum(total.sent_bytes for (name, _), total in totals.items() if name == "stage send")
    received = sum(total.received_bytes for (name, _), total in totals.items() if name == "stage receive")
    return all(right), len(right), sent, received


def test_what_arrives_is_what_was_sent_whatever_its_shape_and_type(on_group):
    told = on_group(3, both_ways, 6)
    payload = sum(4 * 5000 * (3 + number) for number in range(6))
    for right, count, sent, received in told:
        assert right
        assert count == 12
        assert 2 * payload <= sent <= 2 * payload * 1.2  # the words are counted too
        assert received == pytest.approx(sent, rel=0.05)


def out_of_order(group):
    messages = make_messages(group, CPU)
    if group.rank == 0:
        for number in range(4):
            messages.send(1, (number,), {"number": number})
        group.gather(b"")
        return None
    found = [messages.receive(0, (number,))["number"] for number in (2, 0, 3)]
    group.gather(b"")
    try:
        messages.receive(0, (1,))
        messages.settle()
        found.append(1)
        messages._unasked._kept[0, (9,)] = {}
        messages.settle()
    except RunFailed as error:
        return found, str(error)


def test_messages_are_known_by_their_keys_and_those_nobody_asked_for_are_told(on_group):
    found, error = on_group(2, out_of_order)[1]
    assert found == [2, 0, 3, 1]
    assert "1 messages between stages were not asked for, the first one (9,) from stage 0" in error


def lanes(group):
    a, b = make_messages(group, CPU), make_messages(group, CPU)
    if group.rank == 0:
        a.send(1, (0,), {"x": "in a"})
        b.send(1, (0,), {"x": "in b"})
        a.settle()
        b.settle()
        return None
    return b.receive(0, (0,))["x"], a.receive(0, (0,))["x"]


def test_every_lane_has_an_order_of_its_own(on_group):
    assert on_group(2, lanes)[1] == ("in b", "in a")


# --- one host -----------------------------------------------------------------------------------------------------

needs_arena = pytest.mark.skipif(build.allocator() is None, reason="no allocator was compiled")


def read_in_place(group, large):
    messages, arenas = make_messages(group, CPU), group.arenas
    if group.rank == 0:
        with arenas.inside():
            tensor = torch.full((large,), 2.0)
        messages.send(1, (0,), {"x": tensor})
        place = arenas.find(tensor)
        del tensor
        kept = len(messages._lent)
        group.gather(b"")  # 1 has read it, and passed it on
        messages.settle()
        still = len(messages._lent)
        group.gather(b"")  # 2 has let go
        group.gather(b"")  # 1 has let go
        messages.settle()
        return place, kept, still, len(messages._lent)
    x = messages.receive(group.rank - 1, (0,))["x"]
    place, total = arenas.find(x), float(x[5:].sum())
    if group.rank == 1:
        part = x.view(-1, 2)[3:]
        messages.send(2, (0,), {"x": x})
        del x
        group.gather(b"")
        group.gather(b"")
        messages.settle()  # hears of it
        del part
        messages.settle()
        group.gather(b"")
    else:
        group.gather(b"")
        del x
        messages.settle()
        group.gather(b"")
        group.gather(b"")
    return place, total


@needs_arena
def test_a_large_tensor_is_read_where_it_lies_also_when_passed_on_and_is_kept_until_all_let_go(on_workers):
    first, second, third = on_workers(3, read_in_place, 100_000)
    place, kept, still, left = first
    assert place is not None
    assert place[0] == 0
    assert second == third == (place, 2.0 * 99_995)
    assert (kept, still, left) == (1, 1, 0)


def used_in_a_graph(group):
    """What autograd has saved is not let go before the backward pass."""
    messages = make_messages(group, CPU)
    if group.rank == 0:
        with group.arenas.inside():
            tensor = torch.full((200_000,), 3.0)
        messages.send(1, (0,), {"x": tensor})
        del tensor
        counts = []
        for _ in range(2):
            group.gather(b"")
            messages.settle()
            counts.append(len(messages._lent))
            group.gather(b"")
        return counts
    weight = torch.ones(200_000, requires_grad=True)
    loss = (messages.receive(0, (0,))["x"] * weight).sum()
    gc.collect()
    messages.settle()
    group.gather(b"")
    group.gather(b"")
    loss.backward()
    del loss
    messages.settle()
    group.gather(b"")
    group.gather(b"")
    return float(weight.grad.sum())


@needs_arena
def test_what_autograd_has_saved_is_lent_until_its_backward_pass(on_workers):
    assert on_workers(2, used_in_a_graph) == [[1, 0], 600_000.0]


def without_arena(group):
    group.arenas._library = None
    messages = make_messages(group, CPU)
    large = torch.arange(6_000_000, dtype=torch.float32)  # more than one message over a socket holds
    if group.rank == 0:
        messages.send(1, (0,), {"x": large, "y": large[:10]})
        return True
    found = messages.receive(0, (0,))
    return torch.equal(found["x"], large) and torch.equal(found["y"], large[:10])


def test_without_an_arena_all_goes_over_the_socket(on_workers):
    assert all(on_workers(2, without_arena))


def waits(group):
    messages = make_messages(group, CPU)
    group.report(Phase.forward, step=3)
    if group.rank == 0:
        messages.receive(1, (0,))
    os._exit(9) if group.rank == 2 else messages.receive(2, (0,))


def test_a_killed_stage_is_the_one_that_is_named(on_workers):
    with pytest.raises(RunFailed, match=r"^rank 2 on \S+ \(pid \d+\) exited with code 9 at step 3, forward"):
        on_workers(3, waits)


def never_comes(group):
    messages = make_messages(group, CPU)
    group.report(Phase.forward, step=3)
    if group.rank < 2:
        messages.receive(group.rank + 1, (0,))
    while True:
        SimpleNamespace()  # computes for ever


def test_a_stage_whose_message_never_comes_is_named_and_so_is_who_waits_for_it(on_workers):
    with pytest.raises(RunFailed, match=r"rank 2 .*forward.*waiting for rank 2"):
        on_workers(3, never_comes, hang_after_s=0.3)
