"""What a compressed reduction asks of a transport: everybody a row each, and one row to everybody."""

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.torch_all_gather import all_gather

if TYPE_CHECKING:
    from shoal.comm.group import HostGroup

_STAGES = 6  # message kinds from here on are those of stages; exchanges use the kinds below


class Handle(Protocol):
    """A transfer under way; a torch.distributed.Work is one."""

    def is_completed(self) -> bool: ...
    def wait(self) -> Any: ...


class Links(Protocol):
    """Rows of bytes between the ranks of a group.

    A transfer belongs to a stage. Those of one stage are started in the same order by all ranks; those of different
    stages may be started in any order, where ``independent`` says so."""

    rank: int
    world: int
    independent: bool
    sent_bytes: int  # so far, to other ranks

    def scatter_rows(self, size: int) -> tuple[Tensor, Tensor]:
        """Memory for an all-to-all, uint8 [world, size] each: row r of the first goes to rank r, row r of the second
        comes from rank r. The own rows are not moved."""

    def gather_rows(self, size: int) -> tuple[Tensor, Tensor]:
        """Memory for an all-gather: the own row [size] and the rows of all ranks [world, size], uint8."""

    def all_to_all(self, stage: int, rows: tuple[Tensor, Tensor]) -> Handle: ...
    def all_gather(self, stage: int, rows: tuple[Tensor, Tensor]) -> Handle: ...


class TorchLinks:
    """Over a torch.distributed group, of any backend.

    ``stages`` above 1 makes as many groups, so that transfers of different stages are independent; all ranks of the
    group must do so at the same point of their programs. ``timeout``: of those groups."""

    def __init__(
        self,
        group: "dist.ProcessGroup | None",
        device: torch.device,
        stages: int = 1,
        timeout: timedelta | None = None,
    ) -> None:
        whole = group if group is not None else dist.group.WORLD
        self.rank, self.world = dist.get_rank(whole), dist.get_world_size(whole)
        self.independent = stages > 1 and device.type == "cpu"  # on GPUs the order must be equal over all groups too
        self.sent_bytes = 0
        self._device = device
        self.groups: list[dist.ProcessGroup | None] = [whole]
        if self.independent and self.world > 1:
            ranks = dist.get_process_group_ranks(whole)
            self.groups += [
                dist.new_group(ranks, timeout=timeout, use_local_synchronization=True) for _ in range(stages - 1)
            ]

    def scatter_rows(self, size: int) -> tuple[Tensor, Tensor]:
        return self._zeros(self.world, size), self._zeros(self.world, size)

    def gather_rows(self, size: int) -> tuple[Tensor, Tensor]:
        return self._zeros(size), self._zeros(self.world, size)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device=self._device)

    def all_to_all(self, stage: int, rows: tuple[Tensor, Tensor]) -> Handle:
        mine, theirs = rows
        self.sent_bytes += (self.world - 1) * mine.shape[1]
        work: Handle = dist.all_to_all_single(theirs, mine, group=self._group(stage), async_op=True)
        return work

    def all_gather(self, stage: int, rows: tuple[Tensor, Tensor]) -> Handle:
        own, everybody = rows
        self.sent_bytes += (self.world - 1) * len(own)
        work: Handle = all_gather(everybody.view(-1), own, group=self._group(stage), async_op=True)
        return work

    def all_reduce(self, numbers: Tensor) -> Handle:
        """The backend's own sum, uncompressed, in stage 0."""
        self.sent_bytes += 2 * (self.world - 1) * numbers.nbytes // self.world
        work: Handle = dist.all_reduce(numbers, group=self._group(0), async_op=True)
        return work

    def _group(self, stage: int) -> "dist.ProcessGroup | None":
        return self.groups[min(stage, len(self.groups) - 1)]


class HostLinks:
    """Between workers of one host: rows lie on their heap, and a message says that they are there.

    Messages between two workers come in order, so that stages are not independent of each other. Memory may be written
    again once a barrier has told that all have read it."""

    independent = False

    def __init__(self, group: "HostGroup", sign: Callable[[], bytes] = bytes) -> None:
        """``sign`` makes what goes with the messages of stage 0, such as the time."""
        self.rank, self.world = group.rank, group.world
        self.sent_bytes = 0
        self.heard: list[bytes] = [
            b""
        ] * group.world  # what came with the last messages of stage 0 that were waited for
        self._heap, self._mesh, self._sign = group.heap, group.mesh, sign
        self._sequences: dict[int, int] = {}

    def scatter_rows(self, size: int) -> tuple[Tensor, Tensor]:
        table = self._heap.tensor(self.world * self.world * size, torch.uint8).view(self.world, self.world, size)
        return table[self.rank], table[:, self.rank]

    def gather_rows(self, size: int) -> tuple[Tensor, Tensor]:
        table = self._heap.tensor(self.world * size, torch.uint8).view(self.world, size)
        return table[self.rank], table

    def all_to_all(self, stage: int, rows: tuple[Tensor, Tensor]) -> Handle:
        return self._told(stage, rows[0].shape[1])

    def all_gather(self, stage: int, rows: tuple[Tensor, Tensor]) -> Handle:
        return self._told(stage, len(rows[0]))

    def _told(self, stage: int, size: int) -> "_Heard":
        self.sent_bytes += (self.world - 1) * size
        self._sequences[stage] = sequence = self._sequences.get(stage, -1) + 1
        self._mesh.broadcast(_STAGES + stage, sequence, b"" if stage else self._sign())
        return _Heard(self, stage, sequence)

    def hear(self, stage: int, sequence: int) -> None:
        for rank in self._mesh.others:
            said = self._mesh.receive(rank, _STAGES + stage, sequence)
            if not stage:
                self.heard[rank] = said


class _Heard:
    def __init__(self, links: HostLinks, stage: int, sequence: int) -> None:
        self._links, self._stage, self._sequence = links, stage, sequence

    def is_completed(self) -> bool:
        return False  # asking would take a message out of its order

    def wait(self) -> None:
        self._links.hear(self._stage, self._sequence)
