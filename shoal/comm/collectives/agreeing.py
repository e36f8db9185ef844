"""Comparing what the ranks of a torch group ask for before a byte moves: a backend does not, and hangs or ends the job,
or takes the bytes of one call for those of another.

Between processors every call is compared: a word from each rank to each, which takes as long as the shortest message.
Between accelerators the host would have to wait for the device in every call: there, only what has not come after the
same call before is compared, so that loops pay in their first round; ranks that part ways between calls which all have
made in both orders before are not told apart.
"""

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.agreement import compare, digest
from shoal.comm.tensors.carrier import DTYPES, compare_message, told
from shoal.comm.torch_all_gather import all_gather
from shoal.comm.transports.contract import Message
from shoal.comm.transports.torch_group import TorchGroup
from shoal.errors import RunFailed

_REMEMBERED = 4096  # pairs of calls
_KINDS = (*DTYPES, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2)
_FEW = 8  # ranks that send each other their words themselves; more leave it to the backend
_agreements: "WeakKeyDictionary[dist.ProcessGroup, Agreement]" = WeakKeyDictionary()


class Agreement:
    """Of the ranks of one group; each of them calls `reach` before each collective."""

    def __init__(self) -> None:
        self._calls = 0
        self._last = 0
        self._known: set[tuple[int, int]] = set()  # a call, and the one after it: the same on all ranks

    def reach(self, transport: TorchGroup, signature: str) -> None:
        """Raises OutOfStep, on all ranks, unless all say the same."""
        self._calls += 1
        said = digest(signature)
        if transport.device.type == "cpu" or (self._last, said) not in self._known:
            if not _alike(transport, said - (1 << 63)):
                compare(_all_words(transport, signature), transport.members, self._calls)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known.add((self._last, said))
        self._last = said


def agree(transport: TorchGroup, signature: str) -> None:
    """See `Agreement.reach`; the group's first lane carries the words."""
    group = transport.groups[0]
    if group not in _agreements:
        _agreements[group] = Agreement()
    _agreements[group].reach(transport, signature)


def announce(transport: TorchGroup, to: int, data: Tensor) -> None:
    """Tell ``to`` what it is going to receive."""
    if transport.device.type == "cpu":
        head = torch.tensor([_KINDS.index(data.dtype), data.numel()])
        transport.post([Message(to, head)], []).wait()


def expect(transport: TorchGroup, origin: int, room: Tensor) -> None:
    """Hear what `announce` tells. What does not fit into ``room`` is taken out of the way of the next message.

    Raises OutOfStep then."""
    if transport.device.type != "cpu":
        return
    head = torch.empty(2, dtype=torch.int64)
    try:
        transport.post([], [Message(origin, head)]).wait()
    except RunFailed as failure:  # say what was waited for, not how it begins
        what = f"rank {transport.rank} receives from rank {origin} ({room.nbytes} bytes, lane 0)"
        raise RunFailed(f"{what}: {str(failure).partition('): ')[2]}") from failure
    kind, elements = head.tolist()
    if (_KINDS[kind], elements) == (room.dtype, room.numel()):
        return
    came = torch.empty(elements, dtype=_KINDS[kind])
    if elements:
        transport.post([], [Message(origin, came)]).wait()
    compare_message(told(came), room, transport.members[origin], transport.members[transport.rank])


def _alike(transport: TorchGroup, said: int) -> bool:
    """Whether all say the same, which all ranks hear alike."""
    words = torch.tensor([said], device=transport.device)
    if transport.backend != "gloo" or transport.size > _FEW:
        return len(set(_gathered(transport, words).tolist())) == 1
    others = [rank for rank in range(transport.size) if rank != transport.rank]
    rows = torch.empty(len(others), dtype=torch.int64)
    heard = [Message(rank, rows[i : i + 1]) for i, rank in enumerate(others)]
    transport.post([Message(rank, words) for rank in others], heard).wait()
    return set(rows.tolist()) == {said}


def _all_words(transport: TorchGroup, signature: str) -> list[str]:
    mine = torch.tensor(list(signature.encode()), dtype=torch.uint8, device=transport.device)
    lengths = _gathered(transport, torch.tensor([len(mine)], device=transport.device)).tolist()
    padded = torch.cat([mine, mine.new_zeros(max(lengths) - len(mine))])
    table = _gathered(transport, padded).view(len(lengths), -1)
    return [bytes(row[:length].tolist()).decode() for row, length in zip(table, lengths, strict=True)]


def _gathered(transport: TorchGroup, mine: Tensor) -> Tensor:
    rows = mine.new_empty(transport.size * len(mine))
    all_gather(rows, mine, group=transport.groups[0])
    return rows
