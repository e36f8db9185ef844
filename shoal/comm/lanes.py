"""Lanes: collectives of workers that share no memory. On one lane they are matched by their order alone."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.group import Group, Partition
from shoal.comm.torch_all_gather import all_gather


class Work(Protocol):
    """An operation under way; its tensors are not to be touched until it is done."""

    def is_completed(self) -> bool: ...
    def wait(self) -> Any: ...


class Lane(Protocol):
    """Every worker of its group makes the same calls, in the same order. All tensors are flat."""

    def link(self, device: torch.device) -> str:
        """What carries it, as accounts name it."""

    def all_gather(self, whole: Tensor, own: Tensor) -> Work:
        """``own``, from everybody, into ``whole``, by rank."""

    def all_to_all(self, out: Tensor, data: Tensor, received: list[int], sent: list[int]) -> Work:
        """``sent[r]`` elements of ``data`` to each rank r, ``received[r]`` from it, in the order of ranks."""

    def send(self, data: Tensor, to: int) -> None: ...
    def receive(self, out: Tensor, origin: int) -> None: ...


class LanedGroup(Group, Protocol):
    """A group over torch.distributed, or over sockets."""

    def lane(self, *, shared: bool = False) -> Lane:
        """A new one. Called by all. ``shared``: it may be the one that gathers of the group itself take."""

    def split(self, partition: Partition) -> "LanedGroup": ...

    def explained(self, action: str) -> AbstractContextManager[None]:
        """Around what may find that a peer has gone."""


class ProcessGroupLane:
    """Over torch.distributed. ``group`` has the process group as ``pg``, and what its ranks are called, ``names``."""

    def __init__(self, group: Any) -> None:
        self._group = group  # which lets go of its process group when the run ends

    def link(self, device: torch.device) -> str:
        return "nccl" if device.type == "cuda" else "tcp"

    def all_gather(self, whole: Tensor, own: Tensor) -> Work:
        return _under_way(all_gather(whole, own, async_op=True, group=self._group.pg))

    def all_to_all(self, out: Tensor, data: Tensor, received: list[int], sent: list[int]) -> Work:
        return _under_way(dist.all_to_all_single(out, data, received, sent, async_op=True, group=self._group.pg))

    def send(self, data: Tensor, to: int) -> None:
        dist.send(data, self._group.names[to], group=self._group.pg)

    def receive(self, out: Tensor, origin: int) -> None:
        dist.recv(out, self._group.names[origin], group=self._group.pg)


def _under_way(work: "dist.Work | None") -> Work:
    assert work is not None
    return work


def each_of(flat: Tensor, sizes: Sequence[int]) -> dict[int, Tensor]:
    """Rank -> its part of ``flat``, of those that have one."""
    return {rank: part for rank, part in enumerate(torch.split(flat, list(sizes))) if len(part)}
