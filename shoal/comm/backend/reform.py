"""A new group in the same processes, of those that are left, after a group has failed.

On one host the survivors meet again at a socket whose name follows from the old group's tokens, and the lowest of them
opens a store: the old one may have died with the process that held it. Between hosts they meet in the old store.
"""

import hashlib
import json
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shoal.comm.backend.groups import backend_of
from shoal.comm.backend.hosts import Card, rank_list
from shoal.comm.backend.meeting import NotMet, accepted, connected, greet, listener, read_exactly
from shoal.comm.backend.registration import KINDS, Membership
from shoal.errors import RunFailed, UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

PAUSE_S = 0.005  # between two looks whether the others have come
LOOK_S = 0.1  # so often the one who waits for the others looks whether one of them has died meanwhile
MARGIN_S = 2.0  # until who waited for the others has said what came of it
_LENGTH = struct.Struct("<I")


def reform(
    group: "ProcessGroup | None" = None, ranks: Sequence[int] | None = None, timeout_s: float = 30.0
) -> "ProcessGroup":
    """A new group of the members of ``group`` that are alive, in their old order; every one of them calls this.

    For the default group (None) all groups are destroyed and the default one is made anew; for another group, only that
    one. ``ranks``, of the old group, names who goes on, where that is known better; else those whose processes have not
    ended. Waits ``timeout_s`` seconds for them. Raises UserError for a group that is not on "shm" or "hier", and
    RunFailed, naming them, when members that are alive do not come."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_group

    backend = backend_of(group)
    if backend is None:
        raise UserError('reform: only groups of the backends "shm" and "hier" can be formed again.')
    old = group or _get_default_group()
    membership: Membership = backend.membership
    whole = old is _get_default_group()
    everyone = range(len(membership.meeting.cards))
    if ranks is not None and (membership.rank not in ranks or not set(ranks) <= set(everyone)):
        raise UserError(
            f"reform: ranks {sorted(ranks)} must be among 0-{len(everyone) - 1} and hold {membership.rank}."
        )
    abort(backend)
    deadline = time.monotonic() + timeout_s
    if len(membership.meeting.hosts) == 1:
        left, store = _meet_on_host(membership, ranks, deadline)
    else:
        left, store = _meet_in_store(membership, old.get_group_store(), ranks, deadline)
    config = plain_name(str(dist.distributed_c10d._world.pg_backend_config[old]))
    timeout: timedelta = backend.timeout
    rank = left.index(membership.rank)
    if whole:
        dist.destroy_process_group()
        dist.init_process_group(config, store=store, rank=rank, world_size=len(left), timeout=timeout)
        return _get_default_group()
    of_job = dist.get_process_group_ranks(old)
    dist.destroy_process_group(old)
    name = f"reformed-{_address(membership.meeting.cards, left[0])[0]}"
    return _new_group(config, store, rank, [of_job[r] for r in left], name, timeout)


def plain_name(config: str) -> str:
    """What the user had written: torch knows "shm" as "cpu:shm", and warns about the latter."""
    device, _, name = config.partition(":")
    return name if device == "cpu" and name in KINDS else config


def abort(backend: Any) -> None:
    """End the collectives of all members, if it has not come to that by itself."""
    if not backend.why_aborted():
        backend.abort()


def _alive(membership: Membership, ranks: Sequence[int] | None) -> list[int]:
    if ranks is not None:
        return sorted(set(ranks))
    dead = membership.meeting.watches.dead()
    return [rank for rank in range(len(membership.meeting.cards)) if rank not in dead]


def _address(cards: Sequence[Card], lowest: int) -> tuple[str, str]:
    """Where the survivors meet when ``lowest`` is the lowest, and what a visitor must know: only members can tell."""
    secret = hashlib.sha256(" ".join(card.token for card in cards).encode())
    secret.update(f" reform {lowest}".encode())
    digest = secret.hexdigest()
    return f"shoal-{digest[:32]}", digest[32:]


def _meet_on_host(membership: Membership, ranks: Sequence[int] | None, deadline: float) -> tuple[list[int], "Store"]:
    from torch._C._distributed_c10d import TCPStore

    cards, rank = membership.meeting.cards, membership.rank
    user = cards[rank].user
    while True:
        alive = _alive(membership, ranks)
        lowest = alive[0]
        address, token = _address(cards, lowest)
        if lowest == rank:
            return _lead(membership, ranks, address, token, deadline)
        connection = connected(address, user)
        if connection is None:  # not there yet, or it has died since
            if time.monotonic() > deadline:
                raise RunFailed(f"reform: rank {lowest} of {membership.name} is alive and does not come.")
            time.sleep(PAUSE_S)
            continue
        with connection:
            try:
                greet(connection, rank, token, lowest)
                (length,) = _LENGTH.unpack(read_exactly(connection, _LENGTH.size, deadline + MARGIN_S))
                told = json.loads(read_exactly(connection, length, deadline + MARGIN_S))
            except (OSError, EOFError, NotMet):
                if time.monotonic() > deadline:
                    raise RunFailed(f"reform: rank {lowest} of {membership.name} does not go on.") from None
                continue
        if "why" in told:
            raise RunFailed(told["why"])
        left, port = told["ranks"], told["port"]
        return left, TCPStore("127.0.0.1", port, is_master=False)


def _lead(
    membership: Membership, ranks: Sequence[int] | None, address: str, token: str, deadline: float
) -> tuple[list[int], "Store"]:
    """The lowest survivor's part: say who goes on and where their store is."""
    from torch._C._distributed_c10d import TCPStore

    cards, rank = membership.meeting.cards, membership.rank
    came: dict[int, socket.socket] = {}
    with listener(address, len(cards)) as door:
        while missing := set(_alive(membership, ranks)) - {rank} - set(came):
            if time.monotonic() > deadline:
                break
            slice_end = min(deadline, time.monotonic() + LOOK_S)
            came |= accepted(door, token, cards[rank].user, missing, slice_end)
        store = None if missing else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        left = sorted([rank, *came])
        said = (
            {"ranks": left, "port": store.port}
            if store
            else {"why": f"reform: {rank_list(sorted(missing))} of {membership.name} lives and did not come."}
        )
        text = json.dumps(said).encode()
        for connection in came.values():
            with connection, suppress(OSError):  # who has died since is missed in the new group
                connection.sendall(_LENGTH.pack(len(text)) + text)
    if store is None:
        raise RunFailed(str(said["why"]))
    return left, store


def missing_members(
    hosts: Sequence[Sequence[int]], came: Mapping[int, Sequence[int]], ranks: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Who has not come yet: (ranks said to be alive, lowest ranks of hosts from which nobody came).

    ``came[r]`` are the ranks of its host that r believes alive. ``ranks``: exactly these are expected."""
    if ranks is not None:
        return sorted(set(ranks) - set(came)), []
    alive = {rank for believed in came.values() for rank in believed}
    return sorted(alive - set(came)), [host[0] for host in hosts if not set(host) & set(came)]


def _meet_in_store(
    membership: Membership, old: "Store", ranks: Sequence[int] | None, deadline: float
) -> tuple[list[int], "Store"]:
    """Whoever comes first waits for the others and says who goes on. A host from which nobody comes is left out."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed import DistNetworkError, DistStoreError

    meeting, rank = membership.meeting, membership.rank
    _, digest = _address(meeting.cards, 0)
    store = PrefixStore(f"reform/{digest}", old)
    try:
        alive = [r for r in _alive(membership, None) if r in membership.host]
        store.set(f"came/{rank}", json.dumps(alive))
        if store.compare_set("first", "", str(rank)) == str(rank).encode():
            store.set("said", json.dumps(_await_members(membership, store, ranks, deadline)))
        store.wait(["said"], timedelta(seconds=max(1.0, deadline - time.monotonic()) + MARGIN_S))
        told = json.loads(store.get("said"))
    except (DistStoreError, DistNetworkError) as error:
        first = str(error).splitlines()[0]
        raise RunFailed(
            f"reform: the store of {membership.name} does not answer ({first}): it goes with its process, "
            "which is rank 0 unless torchrun started the job."
        ) from None
    if "why" in told:
        raise RunFailed(told["why"])
    if rank not in told["ranks"]:
        raise RunFailed(f"reform: the others of {membership.name} go on without rank {rank}, which came too late.")
    return told["ranks"], PrefixStore("group", store)


def _await_members(
    membership: Membership, store: "Store", ranks: Sequence[int] | None, deadline: float
) -> dict[str, Any]:
    came: dict[int, list[int]] = {}
    while True:
        for other in range(len(membership.meeting.cards)):
            if other not in came and store.check([f"came/{other}"]):
                came[other] = json.loads(store.get(f"came/{other}"))
        absent, gone = missing_members(membership.meeting.hosts, came, ranks)
        late = time.monotonic() > deadline
        if absent and late:
            return {
                "why": f"reform: {rank_list(absent)} of {membership.name} did not come, and nobody knows it to be dead."
            }
        if not absent and (late or not gone):
            return {"ranks": sorted(came if ranks is None else ranks)}
        time.sleep(PAUSE_S)


def _new_group(
    config: str, store: "Store", rank: int, ranks: list[int], name: str, timeout: timedelta
) -> "ProcessGroup":
    """A group of these ranks of the job, over a store of its own; `new_group` would need all ranks of the job."""
    from torch.distributed import Backend, distributed_c10d

    made: ProcessGroup
    made, _ = distributed_c10d._new_process_group_helper(
        len(ranks), rank, ranks, Backend(config), store, distributed_c10d.GroupName(name), timeout=timeout
    )
    distributed_c10d._world.pg_group_ranks[made] = {of_job: place for place, of_job in enumerate(ranks)}
    return made
