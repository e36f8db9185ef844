"""Inside of hosts first, then between them, by slices: each rank of a host carries its share of what leaves the host.

    all_reduce      reduce_scatter inside, one ring between the hosts for each slice, all_gather inside
    reduce_scatter  sums inside, each at one rank of the host, which sends it to the rank of another host it belongs to
    all_gather      to one rank on each other host, which hands it round inside
    broadcast       slices to the root's neighbours, each along a tree of hosts, all_gather inside; reduce: backwards
    all_to_all      to the neighbour that serves the receiver, which sends all of its host's blocks in one message
    gather, scatter, barrier    by one leader a host

Hosts may differ in size. A slice is then what lies between two cuts of any host: rank i of m owns all slices between
i/m and (i+1)/m of the tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import lcm

from shoal.comm.collectives.actions import Program
from shoal.comm.collectives.direct import exchange
from shoal.comm.collectives.draft import Draft, merge
from shoal.comm.collectives.halving_doubling import recursive_doubling
from shoal.comm.collectives.ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from shoal.comm.collectives.trees import binomial_broadcast, binomial_reduce
from shoal.errors import UserError


@dataclass(frozen=True)
class Hosts:
    """Which ranks share a host."""

    groups: tuple[tuple[int, ...], ...]  # the ranks of each host, in order

    @staticmethod
    def of(hosts: Sequence[object]) -> "Hosts":
        """``hosts[rank]`` names rank's host."""
        named: dict[object, list[int]] = {}
        for rank, host in enumerate(hosts):
            named.setdefault(host, []).append(rank)
        return Hosts(tuple(map(tuple, named.values())))

    @property
    def ranks(self) -> int:
        return sum(map(len, self.groups))

    def home(self, rank: int) -> int:
        """The host's place in the list."""
        return next(place for place, group in enumerate(self.groups) if rank in group)

    def partner(self, rank: int, host: int) -> int:
        """The rank of ``host`` that serves ``rank``: itself at home, evenly spread elsewhere."""
        own, group = self.groups[self.home(rank)], self.groups[host]
        return group[own.index(rank) * len(group) // len(own)]


@dataclass(frozen=True)
class _Slices:
    shares: tuple[int, ...]
    owners: tuple[tuple[tuple[int, ...], ...], ...]  # [host][place in it]: the slices that this rank owns

    @staticmethod
    def of(hosts: Hosts) -> "_Slices":
        sizes = [len(group) for group in hosts.groups]
        cuts = sorted({Fraction(i, m) for m in set(sizes) for i in range(m + 1)})
        whole = lcm(*sizes)
        shares = tuple(int((b - a) * whole) for a, b in pairwise(cuts))
        owners = []
        for m in sizes:
            place = [int(cut * m) for cut in cuts[:-1]]
            owners.append(tuple(tuple(s for s, p in enumerate(place) if p == i) for i in range(m)))
        return _Slices(shares, tuple(owners))


def _inside(
    draft: Draft, hosts: Hosts, owned: Callable[[int], list[list[int]]], step: int, *, reduce: bool, ring: bool
) -> int:
    """In each host, member i collects (``reduce``) or hands round the chunks ``owned(host)[i]``; the next step."""
    last = step
    for host, group in enumerate(hosts.groups):
        if ring:
            move = ring_reduce_scatter if reduce else ring_all_gather
            last = max(last, move(draft, group, owned(host), step))
        else:
            last = max(last, exchange(draft, group, owned(host), step, reduce=reduce))
    return last


def all_reduce(hosts: Hosts, *, ring_inside: bool = False) -> Program:
    slices, count = _Slices.of(hosts), len(hosts.groups)
    draft = Draft(hosts.ranks, len(slices.shares) * count)  # a slice is cut in one chunk for each host

    def owned(host: int) -> list[list[int]]:
        return [[s * count + k for s in mine for k in range(count)] for mine in slices.owners[host]]

    step = last = _inside(draft, hosts, owned, 0, reduce=True, ring=ring_inside)
    for number in range(len(slices.shares)):
        members = [
            next(rank for rank, mine in zip(group, slices.owners[host], strict=True) if number in mine)
            for host, group in enumerate(hosts.groups)
        ]
        last = ring_all_reduce(draft, members, [[number * count + k] for k in range(count)], step)
    _inside(draft, hosts, owned, last, reduce=False, ring=ring_inside)
    return draft.program("all_reduce", "two_level", shares=[w for w in slices.shares for _ in range(count)])


def _rooted_slices(hosts: Hosts, root: int) -> tuple[_Slices, list[tuple[list[int], int]]]:
    """Slices, and for each the ranks that carry it, the one on the root's host first."""
    slices, home = _Slices.of(hosts), hosts.home(root)
    order = [*range(home, len(hosts.groups)), *range(home)]
    members = []
    for number in range(len(slices.shares)):
        carriers = [
            next(r for r, mine in zip(hosts.groups[host], slices.owners[host], strict=True) if number in mine)
            for host in order
        ]
        members.append((carriers, number))
    return slices, members


def broadcast(hosts: Hosts, root: int) -> Program:
    slices, members = _rooted_slices(hosts, root)
    draft = Draft(hosts.ranks, len(slices.shares))
    for carriers, number in members:
        if carriers[0] != root:
            draft.message(0, root, carriers[0], number)
    step = last = draft.steps
    for carriers, number in members:
        last = max(last, binomial_broadcast(draft, carriers, [number], step))
    for host, group in enumerate(hosts.groups):
        for place, rank in enumerate(group):
            for to in group:
                if to not in (rank, root):
                    for number in slices.owners[host][place]:
                        draft.message(last, rank, to, number)
    return draft.program("broadcast", "two_level", shares=slices.shares, root=root)


def reduce(hosts: Hosts, root: int) -> Program:
    slices, members = _rooted_slices(hosts, root)
    draft = Draft(hosts.ranks, len(slices.shares))
    step = last = _inside(
        draft, hosts, lambda host: [list(mine) for mine in slices.owners[host]], 0, reduce=True, ring=False
    )
    for carriers, number in members:
        last = max(last, binomial_reduce(draft, carriers, [number], step))
    for carriers, number in members:
        if carriers[0] != root:
            draft.message(last, carriers[0], root, number)
    return draft.program("reduce", "two_level", shares=slices.shares, root=root)


def reduce_scatter(hosts: Hosts, *, ring_inside: bool = False) -> Program:
    draft = Draft(hosts.ranks, hosts.ranks)

    def owned(host: int) -> list[list[int]]:
        return [[b for b in range(hosts.ranks) if hosts.partner(b, host) == rank] for rank in hosts.groups[host]]

    step = _inside(draft, hosts, owned, 0, reduce=True, ring=ring_inside)
    for rank in range(hosts.ranks):
        for host in range(len(hosts.groups)):
            if host != hosts.home(rank):
                draft.message(step, hosts.partner(rank, host), rank, rank, reduce=True)
    return draft.program("reduce_scatter", "two_level")


def all_gather(hosts: Hosts, *, ring_inside: bool = False) -> Program:
    draft = Draft(hosts.ranks, hosts.ranks)
    for rank in range(hosts.ranks):
        for host in range(len(hosts.groups)):
            if host != hosts.home(rank):
                draft.message(0, rank, hosts.partner(rank, host), rank)

    def owned(host: int) -> list[list[int]]:
        return [[b for b in range(hosts.ranks) if hosts.partner(b, host) == rank] for rank in hosts.groups[host]]

    _inside(draft, hosts, owned, draft.steps, reduce=False, ring=ring_inside)
    return draft.program("all_gather", "two_level")


def all_to_all(hosts: Hosts) -> Program:
    n = hosts.ranks
    draft = Draft(n, n * n)
    homes = [hosts.home(rank) for rank in range(n)]
    for origin in range(n):
        for to in range(n):
            via = hosts.partner(to, homes[origin])
            if via not in (origin, to):
                draft.message(0, origin, via, origin * n + to)
            elif origin != to and homes[origin] == homes[to]:
                draft.message(0, origin, to, origin * n + to)
    step = draft.steps
    for origin in range(n):
        for to in range(n):
            if homes[origin] != homes[to]:
                draft.message(step, hosts.partner(to, homes[origin]), to, origin * n + to)
    return draft.program("all_to_all", "two_level")


def gather(hosts: Hosts, root: int) -> Program:
    draft, home = Draft(hosts.ranks, hosts.ranks), hosts.home(root)
    for host, group in enumerate(hosts.groups):
        leader = root if host == home else group[0]
        for rank in group:
            if rank != leader:
                draft.message(0, rank, leader, rank)
    step = draft.steps
    for host, group in enumerate(hosts.groups):
        if host != home:
            for rank in group:
                draft.message(step, group[0], root, rank)
    return draft.program("gather", "two_level", root=root)


def scatter(hosts: Hosts, root: int) -> Program:
    draft, home = Draft(hosts.ranks, hosts.ranks), hosts.home(root)
    for host, group in enumerate(hosts.groups):
        if host != home:
            for rank in group:
                draft.message(0, root, group[0], rank)
    step = draft.steps
    for host, group in enumerate(hosts.groups):
        leader = root if host == home else group[0]
        for rank in group:
            if rank != leader:
                draft.message(step, leader, rank, rank)
    return draft.program("scatter", "two_level", root=root)


def barrier(hosts: Hosts) -> Program:
    draft = Draft(hosts.ranks, 1)
    step = max(binomial_reduce(draft, group, [0]) for group in hosts.groups)
    step = recursive_doubling(draft, [group[0] for group in hosts.groups], [0], step)
    for group in hosts.groups:
        binomial_broadcast(draft, group, [0], step)
    return draft.program("barrier", "two_level")


def pipelined(one: Program, segments: int) -> Program:
    """Segments of the tensor that follow each other a round apart: one is inside a host while another is between."""
    return one if segments == 1 else merge([one] * segments, one.algorithm, delay=1)


def hosts_of(hosts: Sequence[object] | None, ranks: int) -> Hosts:
    """Raises UserError unless ``hosts`` names a host for each rank; None puts all ranks on one."""
    named = [0] * ranks if hosts is None else hosts
    if len(named) != ranks:
        raise UserError(f"two_level: {ranks} ranks need a host each, got {len(named)} hosts.")
    return Hosts.of(named)
