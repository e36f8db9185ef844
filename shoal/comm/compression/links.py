"""What a compressed reduction asks of a transport: everybody a row each, and one row to everybody."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


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
    group must do so at the same point of their programs."""

    def __init__(self, group: "dist.ProcessGroup | None", device: torch.device, stages: int = 1) -> None:
        whole = group if group is not None else dist.group.WORLD
        self.rank, self.world = dist.get_rank(whole), dist.get_world_size(whole)
        self.independent = stages > 1 and device.type == "cpu"  # on GPUs the order must be equal over all groups too
        self.sent_bytes = 0
        self._device = device
        self._groups = [whole]
        if self.independent and self.world > 1:
            ranks = dist.get_process_group_ranks(whole)
            self._groups += [dist.new_group(ranks, use_local_synchronization=True) for _ in range(stages - 1)]

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
        work: Handle = _all_gather(everybody.view(-1), own, group=self._group(stage), async_op=True)
        return work

    def all_reduce(self, numbers: Tensor) -> Handle:
        """The backend's own sum, uncompressed, in stage 0."""
        self.sent_bytes += 2 * (self.world - 1) * numbers.nbytes // self.world
        work: Handle = dist.all_reduce(numbers, group=self._group(0), async_op=True)
        return work

    def _group(self, stage: int) -> "dist.ProcessGroup | None":
        return self._groups[stage if len(self._groups) > 1 else 0]
