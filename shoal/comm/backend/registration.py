"""`install()` makes the names "shm" and "hier" known to torch.distributed; how a group of these names is made."""

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroupGloo

from shoal.comm.backend.hosts import Card, cores_of, host_list, rank_list, without_library, without_python
from shoal.comm.backend.in_python.chunks import memory_bytes
from shoal.comm.backend.in_python.group import Local, PythonGroup
from shoal.comm.backend.meeting import Meeting, is_socket, meet
from shoal.comm.backend.memory import NoRoom
from shoal.comm.native import build
from shoal.errors import UserError

KINDS = ("shm", "hier")
COST = "collectives on one host go over TCP, 2 to 10 times slower"
COST_IN_PYTHON = "collectives take longer and more processor time; `shoal doctor` measures how much"
ACCELERATED = "a group in Python cannot stand beside one for accelerators"
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
        return self.part(store, rank, size, options.group_name or "part", options._timeout)

    def part(self, store: Store, rank: int, size: int, name: str, timeout: timedelta) -> Any:
        return make_backend(self.kind, store, rank, size, timeout, f"{name} of {self.name.removeprefix('group ')}")

    @property
    def host(self) -> tuple[int, ...]:
        return next(host for host in self.meeting.hosts if self.rank in host)


def install() -> None:
    """Make ``init_process_group("shm")``, ``("hier")`` and ``("cpu:hier,cuda:nccl")`` work. Can be called again.

    Compiles what they need where that has not been done. Without a compiler, groups of these names go over shared
    memory in Python where all ranks are on one host, else over gloo, and say so."""
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


class _Means:
    """What the ranks of a host share, by the compiled part or in Python: decided once all cards are on the table."""

    def __init__(self, kind: str, name: str, rank: int, size: int, timeout_s: float) -> None:
        self.kind, self.name, self.rank, self.size, self.timeout_s = kind, name, rank, size, timeout_s
        self.module = build.backend()
        self.lacking = ""  # why the compiled part does not do it

    def refuse(self, cards: Sequence[Card], hosts: Sequence[Sequence[int]]) -> str:
        if self.kind == "shm" and len(hosts) > 1:
            raise UserError(
                f"backend 'shm' is for ranks of one host, and group {self.name!r} has {host_list(hosts, cards)}: "
                "use 'hier'."
            )
        self.lacking = without_library(cards)
        neither = self.lacking and without_python(cards, hosts)
        return f"{self.lacking}; {neither}" if neither else ""

    def sizes(self, ranks: int) -> tuple[int, int]:
        if self.lacking:
            return memory_bytes(ranks), memory_bytes(ranks)
        assert self.module is not None
        return self.module.total_bytes(ranks), self.module.reserved_bytes(ranks)

    def attach(
        self,
        file: int,
        place: int,
        host: Sequence[int],
        descriptors: Sequence[int],
        cards: Sequence[Card],
        connections: Mapping[int, socket.socket],
    ) -> Any:
        try:
            if self.lacking:
                pidfds = {r: watch for r, watch in enumerate(descriptors) if watch >= 0 and not is_socket(watch)}
                pids = [card.pid for card in cards]
                return Local(file, place, len(host), connections, pidfds, pids, self.name, self.timeout_s)
            assert self.module is not None
            of_all = f", on the host of its {rank_list(host)}, called here 0-{len(host) - 1}"
            return self.module.ShmGroup(
                memfd=file,
                rank=place,
                world=len(host),
                pidfds=list(descriptors),
                name=self.name + ("" if len(host) == self.size else of_all),
                timeout_s=min(JOIN_S, self.timeout_s),
                usable_cores=cores_of([cards[r] for r in host]),
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise NoRoom(str(error)) from None


def make_backend(kind: str, store: Store, rank: int, size: int, timeout: timedelta, name: str) -> Any:
    """The backend of one rank of a new group, or a whole group in Python; called by all of its ranks at the same time.

    Raises UserError when ranks of an "shm" group are on several hosts."""
    means = _Means(kind, name, rank, size, timeout.total_seconds())
    module = means.module
    meeting = meet(
        PrefixStore("shoal", store),
        rank,
        size,
        timeout.total_seconds(),
        Path(str(module.__file__)).name if module else "",
        "" if module else build.why_not(("backend",)),
        means.refuse,
        means.sizes,
        means.attach,
        ACCELERATED if torch.accelerator.is_available() else "",
    )
    one_host = len(meeting.hosts) == 1
    gloo = _gloo(PrefixStore("gloo", store), rank, size, timeout, one_host)
    if meeting.memory is None:
        if rank == 0:
            _say_once(f"backend {kind!r} goes over gloo: {meeting.why}; {COST}")
        gloo._set_sequence_number_for_group()
        return gloo
    membership = Membership(kind, f"group {name!r}", rank, meeting)
    if means.lacking:
        if rank == 0:
            _say_once(f"backend {kind!r} goes over shared memory in Python: {means.lacking}; {COST_IN_PYTHON}")
        return PythonGroup(store, rank, size, meeting.memory, gloo, membership, kind)
    assert module is not None
    between = None if one_host else ProcessGroupGloo(PrefixStore("between", store), rank, size, timeout)
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
