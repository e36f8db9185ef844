"""Comparing what the ranks of a torch group ask for before a byte moves: a backend does not, and hangs or ends the job.

Comparing costs an operation as long as a small collective. So it is done for what has not come after the same call
before, on any rank; loops pay in their first round. What this does not see is ranks that part ways between calls which
all have made in both orders before: they wait until the group's time is over.
"""

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from shoal.comm.agreement import compare, digest
from shoal.comm.torch_all_gather import all_gather
from shoal.comm.transports.torch_group import TorchGroup

_REMEMBERED = 4096  # pairs of calls
_agreements: "WeakKeyDictionary[dist.ProcessGroup, Agreement]" = WeakKeyDictionary()


class Agreement:
    """Of the ranks of one group; each of them calls `reach` before each collective."""

    def __init__(self, transport: TorchGroup) -> None:
        self._members, self._device = transport.members, transport.device
        self._calls = 0
        self._last = 0
        self._known: set[tuple[int, int]] = set()  # a call, and the one after it: the same on all ranks

    def reach(self, group: dist.ProcessGroup, signature: str) -> None:
        """Raises OutOfStep, on all ranks, unless all say the same."""
        self._calls += 1
        said = digest(signature)
        if (self._last, said) not in self._known:
            rows = self._gathered(group, torch.tensor([said - (1 << 63)], device=self._device))
            if len(set(rows.tolist())) > 1:
                compare(self._words(group, signature), self._members, self._calls)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known.add((self._last, said))
        self._last = said

    def _words(self, group: dist.ProcessGroup, signature: str) -> list[str]:
        mine = torch.tensor(list(signature.encode()), dtype=torch.uint8, device=self._device)
        lengths = self._gathered(group, torch.tensor([len(mine)], device=self._device)).tolist()
        padded = torch.cat([mine, mine.new_zeros(max(lengths) - len(mine))])
        table = self._gathered(group, padded).view(len(lengths), -1)
        return [bytes(row[:length].tolist()).decode() for row, length in zip(table, lengths, strict=True)]

    def _gathered(self, group: dist.ProcessGroup, mine: torch.Tensor) -> torch.Tensor:
        rows = mine.new_empty(len(self._members) * len(mine))
        all_gather(rows, mine, group=group)
        return rows


def agree(transport: TorchGroup, signature: str) -> None:
    """See `Agreement.reach`; the group's first lane carries the words."""
    group = transport.groups[0]
    if group not in _agreements:
        _agreements[group] = Agreement(transport)
    _agreements[group].reach(group, signature)
