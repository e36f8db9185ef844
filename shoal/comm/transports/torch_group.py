"""Messages over torch.distributed: any backend that sends and receives (gloo, nccl, mpi, and Shoal's own).

Each lane is a process group of its own, of the same ranks: gloo groups bound to different interfaces, for example.
Receives are posted before sends; where a backend launches messages together (nccl), a round is one launch.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from shoal.comm.transports.contract import Message
from shoal.errors import RunFailed, UserError


class _Works:
    def __init__(self, works: list[tuple[dist.Work, str]], patience: timedelta | None) -> None:
        self._works, self._patience = works, patience

    def wait(self) -> None:
        for work, what in self._works:
            try:
                if self._patience is None:
                    work.wait()
                else:
                    work.wait(self._patience)
            except (RuntimeError, ValueError) as error:
                raise RunFailed(f"{what}: {str(error).splitlines()[0] if str(error) else 'failed'}") from error


class TorchGroup:
    """``groups[lane]`` carries a lane's messages; None is torch's default group. Ranks are those of the groups.

    ``timeout_s``: how long a round may be waited for; by default as long as the groups say."""

    def __init__(self, groups: Sequence[dist.ProcessGroup | None] = (None,), *, timeout_s: float | None = None) -> None:
        self._patience = None if timeout_s is None else timedelta(seconds=timeout_s)
        if not groups:
            raise UserError("TorchGroup: it needs at least one process group.")
        if not dist.is_initialized():
            raise UserError("TorchGroup: torch.distributed is not initialised: call init_process_group first.")
        self.groups = tuple(group or dist.distributed_c10d._get_default_group() for group in groups)
        members = [dist.get_process_group_ranks(group) for group in self.groups]
        if any(ranks != members[0] for ranks in members):
            raise UserError(f"TorchGroup: all lanes must have the same ranks, got {members}.")
        self.members = members[0]  # their ranks in the default group
        self.rank, self.size = dist.get_rank(self.groups[0]), len(self.members)
        if self.rank < 0:
            raise UserError("TorchGroup: this process is not a member of the group.")

    @property
    def backend(self) -> str:
        """As torch calls it: "gloo", "nccl", "cpu:gloo,cuda:nccl", ..."""
        return str(dist.get_backend(self.groups[0]))

    @property
    def device(self) -> torch.device:
        """Where tensors can be sent from."""
        return torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")

    @property
    def counts_itself(self) -> bool:
        """Shoal's own backends count what goes through them."""
        try:
            return hasattr(self.groups[0]._get_backend(torch.device("cpu")), "counters")
        except RuntimeError:  # a group for accelerators alone
            return False

    @property
    def lanes(self) -> int:
        return len(self.groups)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Works:
        if any(not 0 <= m.lane < self.lanes for m in (*sends, *receives)):
            raise UserError(f"TorchGroup: it has {self.lanes} lanes (process groups), and the program names more.")
        works: list[tuple[dist.Work, str]] = []
        for lane, group in enumerate(self.groups):
            into = [m for m in receives if m.lane == lane]
            out = [m for m in sends if m.lane == lane]
            if into or out:
                works += self._post(group, lane, into, out)
        return _Works(works, self._patience)

    def _post(
        self, group: dist.ProcessGroup, lane: int, receives: Sequence[Message], sends: Sequence[Message]
    ) -> list[tuple[dist.Work, str]]:
        def told(verb: str, message: Message) -> str:
            count = message.data.numel() * message.data.element_size()
            return f"rank {self.rank} {verb} rank {message.peer} ({count} bytes, lane {lane})"

        device = (*receives, *sends)[0].data.device
        if device.type != "cpu" and group._get_backend(device).supports_coalescing:
            ops = [dist.P2POp(dist.irecv, _bytes(m.data), group=group, group_peer=m.peer) for m in receives]
            ops += [dist.P2POp(dist.isend, _bytes(m.data), group=group, group_peer=m.peer) for m in sends]
            return [(work, f"rank {self.rank}: a round on lane {lane}") for work in dist.batch_isend_irecv(ops)]
        works = [(group.recv([_bytes(m.data)], m.peer, lane), told("receives from", m)) for m in receives]
        works += [(group.send([_bytes(m.data)], m.peer, lane), told("sends to", m)) for m in sends]
        return works

    def worked(self, reduced: int, copied: int) -> None:
        """Time passes by itself here."""


def _bytes(data: torch.Tensor) -> torch.Tensor:
    """Backends differ in the element types that they know; all know bytes."""
    return data.view(torch.uint8)
