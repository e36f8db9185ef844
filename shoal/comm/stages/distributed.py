"""Messages between stages over torch.distributed: gloo between processors, NCCL between GPUs.

A message is one tensor of a fixed size with its words and its small tensors, then what did not fit in, then each large
tensor on its own. Sends do not wait. A worker asks for messages in the order in which its peer sent them, and never for
more than one at a time, so that a group's point-to-point operations match by order alone, on any backend.
"""

import struct
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.stages.form import Head, pack, raw, region_of, unpack
from shoal.comm.stages.messages import RECEIVE, SEND, Key, Unasked
from shoal.comm.status import Phase, peer_name

if TYPE_CHECKING:
    from shoal.comm.distributed import DistributedGroup

_LENGTHS = struct.Struct("<QQ")  # bytes of the head, and of the small tensors behind it
FIRST = 8192  # bytes of a message's first tensor
SMALL = 4096  # bytes: more goes on its own


class DistributedMessages:
    """See StageMessages. ``device`` is where tensors come from and go to.

    ``ahead``: before a send, all but so many of the older ones to that worker must have been taken; 0: any number may
    be under way."""

    def __init__(self, group: "DistributedGroup", device: torch.device, ahead: int) -> None:
        self._ahead = ahead
        self._group, self._device = group.split([tuple(range(group.world))]), device
        link = "nccl" if device.type == "cuda" else "tcp"
        self._clock, self._report = group.counters.clock, group.report
        self._sends, self._receives = group.counters.tally(SEND, link), group.counters.tally(RECEIVE, link)
        self._sending: dict[int, deque[tuple[list[dist.Work], list[Tensor]]]] = defaultdict(deque)
        self._unasked = Unasked()
        self.waited_s = 0.0

    def _name(self, rank: int) -> int:
        return self._group.names[rank]

    def send(self, to: int, key: Key, values: Mapping[str, Any]) -> None:
        if self._ahead:
            self._let_go(to, self._ahead)
        packed = pack(values)
        alone = [view.nbytes >= SMALL for view in packed.views]
        head = Head(key, packed.words, packed.views, tuple((0, 0) if each else None for each in alone)).encode()
        small = b"".join(
            raw(region).cpu().numpy().tobytes()
            for region, large in zip(packed.regions, alone, strict=True)
            if not large
        )
        words = _LENGTHS.pack(len(head), len(small)) + head + small
        first = torch.zeros(max(FIRST, len(words)), dtype=torch.uint8)
        first.numpy().data[: len(words)] = words
        pieces = [first[:FIRST]] + ([first[FIRST:]] if len(first) > FIRST else [])
        pieces += [raw(region) for region, large in zip(packed.regions, alone, strict=True) if large]
        name = self._name(to)
        with self._group.explained(f"a message to {peer_name(name)}"):
            works = [dist.isend(piece, name, group=self._group.pg) for piece in pieces]
        self._sending[to].append(([work for work in works if work is not None], pieces))
        self._sends.call(sent=sum(piece.nbytes for piece in pieces))

    def receive(self, origin: int, key: Key) -> dict[str, Any]:
        return self._unasked.until(origin, key, self._next)

    def _next(self, origin: int) -> tuple[Key, dict[str, Any]]:
        before, asked, name = self._report.position, self._clock(), self._name(origin)
        self._report(Phase.waiting, peer=name)
        with self._group.explained(f"waiting for a message of {peer_name(name)}"):
            words = self._take(torch.empty(FIRST, dtype=torch.uint8), name)
            length, small = _LENGTHS.unpack_from(words.numpy().data)
            total = _LENGTHS.size + length + small
            if total > FIRST:
                words = torch.cat([words, self._take(torch.empty(total - FIRST, dtype=torch.uint8), name)])
            data = words.numpy().data
            head = Head.decode(data[_LENGTHS.size : _LENGTHS.size + length])
            tensors, at, moved = [], _LENGTHS.size + length, len(words)
            for view, place in zip(head.views, head.places, strict=True):
                if place:
                    region = torch.empty(view.elements, dtype=view.torch_dtype, device=self._device)
                    self._take(raw(region), name)
                    moved += region.nbytes
                else:
                    region = region_of(view, data[at:]).to(self._device)
                    at += view.nbytes
                tensors.append(view.of(region))
        stood = self._clock() - asked
        self._receives.call(received=moved)
        self._receives.wait(origin, stood)
        self.waited_s += stood
        self._report(before.phase, shard=before.shard)
        return head.key, unpack(head.words, tensors)

    def _take(self, into: Tensor, name: int) -> Tensor:
        work = dist.irecv(into, name, group=self._group.pg)
        assert work is not None
        work.wait()
        return into

    def _let_go(self, to: int, messages: int) -> None:
        """Wait until all but the newest ``messages`` to a worker have been taken: their memory is free again."""
        sending = self._sending[to]
        with self._group.explained(f"a message to {peer_name(self._name(to))}"):
            while len(sending) > messages:
                works, _ = sending.popleft()
                for work in works:
                    work.wait()

    def settle(self) -> None:
        for to in list(self._sending):
            self._let_go(to, 0)
        self._unasked.check_none()
