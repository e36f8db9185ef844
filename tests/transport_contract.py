"""What every transport must do, as steps of a rank that return what they saw. Run by the tests of each transport."""

from collections.abc import Callable
from typing import Any

import torch

from shoal.comm.transports.contract import Message, Steps, Transport


def numbers(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.int32)


def ring_of_messages(end: Transport) -> Steps[bool]:
    """Everybody sends to the next before anybody has received: nobody waits for ever, whatever the size."""
    right = True
    for count in (1, 1000, 1_000_000):
        into = torch.zeros(count, dtype=torch.int32)
        mine = numbers(count, end.rank)
        yield end.post([Message((end.rank + 1) % end.size, mine)], [Message((end.rank - 1) % end.size, into)])
        right = right and torch.equal(into, numbers(count, (end.rank - 1) % end.size))
    return right


def messages_of_a_pair_keep_their_order(end: Transport) -> Steps[list[int]]:
    if end.rank == 0:
        yield end.post([Message(1, torch.tensor([i], dtype=torch.int32)) for i in range(20)], [])
        return []
    if end.rank > 1:
        return []
    got: list[int] = []
    for _ in range(4):  # the receiver takes them in other rounds than they were posted in
        into = [torch.zeros(1, dtype=torch.int32) for _ in range(5)]
        yield end.post([], [Message(0, each) for each in into])
        got += [int(each) for each in into]
    return got


def rounds_posted_before_they_are_waited_for(end: Transport) -> Steps[list[int]]:
    into = [torch.zeros(1, dtype=torch.int32) for _ in range(3)]
    peer = end.rank ^ 1
    if peer >= end.size:
        return []
    pending = [
        end.post([Message(peer, torch.tensor([10 * end.rank + i], dtype=torch.int32))], [Message(peer, each)])
        for i, each in enumerate(into)
    ]
    yield from reversed(pending)
    return [int(each) for each in into]


def what_was_sent_may_be_overwritten(end: Transport) -> Steps[bool]:
    """...as soon as the wait is over, even when the peer looks much later."""
    other = numbers(100_000, 7)
    if end.rank == 0:
        mine = numbers(100_000, 7)
        yield end.post([Message(1, mine)], [])
        mine.fill_(-1)
        yield end.post([Message(1, mine)], [])
    elif end.rank == 1:
        first, second = torch.zeros(100_000, dtype=torch.int32), torch.zeros(100_000, dtype=torch.int32)
        yield end.post([], [Message(0, first)])
        yield end.post([], [Message(0, second)])
        return torch.equal(first, other) and bool((second == -1).all())
    return True


def everybody_talks_to_everybody_at_once(end: Transport) -> Steps[list[int]]:
    peers = [rank for rank in range(end.size) if rank != end.rank]
    into = {peer: torch.zeros(300, dtype=torch.int32) for peer in peers}
    sends = [Message(peer, torch.full((300,), 100 * end.rank + peer, dtype=torch.int32)) for peer in peers]
    yield end.post(sends, [Message(peer, into[peer]) for peer in peers])
    return [int(into[peer].unique()) for peer in peers]


def lanes_are_separate(end: Transport) -> Steps[list[int]]:
    """The receiver asks for lane 1 first."""
    if end.rank == 0:
        yield end.post([Message(1, torch.tensor([4]), 0), Message(1, torch.tensor([5]), 1)], [])
    elif end.rank == 1:
        one, zero = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        yield end.post([], [Message(0, one, 1)])
        yield end.post([], [Message(0, zero, 0)])
        return [int(zero), int(one)]
    return []


def a_round_without_messages(end: Transport) -> Steps[bool]:
    yield end.post([], [])
    end.worked(10, 10)
    yield end.post([], [])
    return True


def bytes_of_any_type(end: Transport) -> Steps[bool]:
    right = True
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex64):
        mine = torch.ones(9).to(dtype)
        into = torch.zeros(9).to(dtype)
        yield end.post([Message((end.rank + 1) % end.size, mine)], [Message((end.rank - 1) % end.size, into)])
        right = right and torch.equal(into, mine)
    return right


def who_is_there(end: Transport) -> Steps[tuple[int, int]]:
    return end.rank, end.size
    yield


# What each rank must return, for so many ranks.
CONTRACT: dict[Callable[[Transport], Steps[Any]], Callable[[int, int], Any]] = {
    ring_of_messages: lambda rank, size: True,
    messages_of_a_pair_keep_their_order: lambda rank, size: list(range(20)) if rank == 1 else [],
    rounds_posted_before_they_are_waited_for: lambda rank, size: (
        [10 * (rank ^ 1) + i for i in range(3)] if rank ^ 1 < size else []
    ),
    what_was_sent_may_be_overwritten: lambda rank, size: True,
    everybody_talks_to_everybody_at_once: lambda rank, size: [100 * p + rank for p in range(size) if p != rank],
    lanes_are_separate: lambda rank, size: [4, 5] if rank == 1 else [],
    a_round_without_messages: lambda rank, size: True,
    bytes_of_any_type: lambda rank, size: True,
    who_is_there: lambda rank, size: (rank, size),
}
