"""`install()` makes the names "shm" and "hier" known to torch.distributed; how a group of these names is made."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroupGloo

from shoal.comm.backend.hosts import Card, cores_of, host_list, rank_list, without_library
from shoal.comm.backend.meeting import Meeting, meet
from shoal.comm.backend.memory import NoRoom
from shoal.comm.native import build
from shoal.errors import UserError

KINDS = ("shm", "hier")
COST = "collectives on one host go over TCP, 2 to 10 times slower"
JOIN_S = 60.0  # the ranks of a host map their memory within this time of each other


@dataclass(frozen=True)
class Membership:
    """What a rank's backend remembers of how it was made. Held by the backend itself."""

    kind: str
    name: str
    rank: int
    meeting: Meeting

    def make(self, store: Store, rank: int, size: int, options: Any) -> Any:
        """The backend of a part of this group (`split_group`)."""
        name = f"{options.group_name or 'part'} of {self.name.removeprefix('group ')}"
        return make_backend(self.kind, store, rank, size, options._timeout, name)

    @property
    def host(self) -> tuple[int, ...]:
        return next(host for host in self.meeting.hosts if self.rank in host)


def install() -> None:
    """Make ``init_process_group("shm")``, ``("hier")`` and ``("cpu:hier,cuda:nccl")`` work. Can be called again.

    Compiles what they need where that has not been done. Without a compiler, groups of these names are gloo's, and say
    so."""
    build.backend()
    for kind in KINDS:
        if getattr(dist.Backend, kind.upper(), None) != kind:
            dist.Backend.register_backend(kind, partial(_create, kind), extended_api=True, devices=["cpu"])


def _create(kind: str, options: Any, _: Any) -> Any:
    timeout = options.timeout if isinstance(options.timeout, timedelta) else timedelta(seconds=options.timeout)
    return make_backend(
        kind,
        options.store,
        options.group_rank,
        options.group_size,
        timeout,
        group_name(options.group_id, options.global_ranks_in_group),
    )


def group_name(group_id: str, ranks: Sequence[int]) -> str:
    """As error messages call it."""
    return f"{group_id}, {rank_list(ranks)} of the job" if ranks else "default"


@cache
def _say_once(line: str) -> None:
    print(f"shoal: {line}", file=sys.stderr, flush=True)


def make_backend(kind: str, store: Store, rank: int, size: int, timeout: timedelta, name: str) -> Any:
    """The backend of one rank of a new group; called by all of its ranks at the same time.

    Raises UserError when ranks of an "shm" group are on several hosts."""
    module = build.backend()

    def refuse(cards: Sequence[Card], hosts: Sequence[Sequence[int]]) -> str:
        if kind == "shm" and len(hosts) > 1:
            raise UserError(
                f"backend 'shm' is for ranks of one host, and group {name!r} has {host_list(hosts, cards)}: use 'hier'."
            )
        return without_library(cards)

    def attach(file: int, place: int, host: Sequence[int], descriptors: Sequence[int], cards: Sequence[Card]) -> Any:
        assert module is not None  # `refuse` saw to it
        note = "" if len(host) == size else f", on the host of its {rank_list(host)}, called here 0-{len(host) - 1}"
        try:
            return module.ShmGroup(
                memfd=file,
                rank=place,
                world=len(host),
                pidfds=list(descriptors),
                name=name + note,
                timeout_s=min(JOIN_S, timeout.total_seconds()),
                usable_cores=cores_of([cards[r] for r in host]),
            )
        except (RuntimeError, ValueError) as error:
            raise NoRoom(str(error)) from None

    meeting = meet(
        PrefixStore("shoal", store),
        rank,
        size,
        timeout.total_seconds(),
        Path(str(module.__file__)).name if module else "",
        "" if module else build.why_not(("backend",)),
        refuse,
        partial(_sizes, module),
        attach,
    )
    one_host = len(meeting.hosts) == 1
    gloo = _gloo(PrefixStore("gloo", store), rank, size, timeout, one_host)
    if meeting.memory is None:
        if rank == 0:
            _say_once(f"backend {kind!r} goes over gloo: {meeting.why}; {COST}")
        gloo._set_sequence_number_for_group()
        return gloo
    assert module is not None
    between = None if one_host else ProcessGroupGloo(PrefixStore("between", store), rank, size, timeout)
    membership = Membership(kind, f"group {name!r}", rank, meeting)
    return module.ShoalBackend(
        local=meeting.memory,
        gloo=gloo,
        between=between,
        hosts=[list(host) for host in meeting.hosts],
        rank=rank,
        size=size,
        kind=kind,
        name=membership.name,
        timeout=timeout,
        membership=membership,
    )


def _sizes(module: ModuleType | None, ranks: int) -> tuple[int, int]:
    assert module is not None
    return module.total_bytes(ranks), module.reserved_bytes(ranks)


def _gloo(store: Store, rank: int, size: int, timeout: timedelta, one_host: bool) -> ProcessGroupGloo:
    """Gloo for point-to-point, for what shared memory cannot do, and between hosts. Inside of one host over loopback:
    no port is open to others, and no name of this host has to be resolvable."""
    if one_host and "GLOO_SOCKET_IFNAME" not in os.environ:
        with suppress(RuntimeError):  # no loopback interface: as gloo would do by itself
            options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            options._timeout = timeout
            options._threads = 2
            return ProcessGroupGloo(store, rank, size, options)
    return ProcessGroupGloo(store, rank, size, timeout)
