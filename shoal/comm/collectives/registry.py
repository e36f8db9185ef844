"""Which algorithm carries out which collective."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from shoal.comm.collectives import canonical, direct, halving_doubling, ring, trees, two_level
from shoal.comm.collectives.actions import COLLECTIVES, ROOTED, Program
from shoal.comm.collectives.two_level import Hosts, hosts_of, pipelined
from shoal.errors import UserError, unknown_name


@dataclass(frozen=True)
class Call:
    """What a program depends on, beside collective and algorithm."""

    ranks: int
    hosts: Hosts
    segments: int
    root: int
    target: int


Builder = Callable[[Call], Program]


@dataclass(frozen=True)
class Algorithm:
    name: str
    about: str
    makes: dict[str, Builder]  # by collective
    pipelined: frozenset[str] = frozenset()  # the collectives that take more than one segment
    uses_hosts: bool = False


def _two_level(make: Callable[[Call], Program]) -> Builder:
    return lambda call: pipelined(make(call), call.segments)


def _ring_inside(make: Callable[..., Program]) -> Builder:
    return lambda call: pipelined(
        replace(make(call.hosts, ring_inside=True), algorithm="two_level_ring"), call.segments
    )


_ALL = [
    Algorithm(
        "direct",
        "all messages in one round; an all_reduce sends everything to everybody",
        {
            "all_reduce": lambda c: direct.all_reduce(c.ranks),
            "reduce": lambda c: direct.reduce(c.ranks, c.root),
            "broadcast": lambda c: direct.broadcast(c.ranks, c.root),
            "reduce_scatter": lambda c: direct.reduce_scatter(c.ranks),
            "all_gather": lambda c: direct.all_gather(c.ranks),
            "scatter": lambda c: direct.scatter(c.ranks, c.root),
            "gather": lambda c: direct.gather(c.ranks, c.root),
            "all_to_all": lambda c: direct.all_to_all(c.ranks),
            "send_recv": lambda c: direct.send_recv(c.ranks, c.root, c.target),
            "barrier": lambda c: direct.barrier(c.ranks),
        },
    ),
    Algorithm(
        "two_shot",
        "each rank adds up a slice and hands it round: two rounds, as few bytes as a ring",
        {"all_reduce": lambda c: direct.scattered_all_reduce(c.ranks)},
    ),
    Algorithm(
        "pairwise",
        "one partner a round",
        {
            "all_reduce": lambda c: direct.scattered_all_reduce(c.ranks, pairwise=True),
            "reduce_scatter": lambda c: direct.reduce_scatter(c.ranks, pairwise=True),
            "all_gather": lambda c: direct.all_gather(c.ranks, pairwise=True),
            "all_to_all": lambda c: direct.all_to_all(c.ranks, pairwise=True),
        },
    ),
    Algorithm(
        "ring",
        "neighbours only, all links busy; a chain of segments for broadcast and reduce",
        {
            "all_reduce": lambda c: ring.all_reduce(c.ranks),
            "reduce_scatter": lambda c: ring.reduce_scatter(c.ranks),
            "all_gather": lambda c: ring.all_gather(c.ranks),
            "broadcast": lambda c: ring.broadcast(c.ranks, c.root, c.segments),
            "reduce": lambda c: ring.reduce(c.ranks, c.root, c.segments),
        },
        frozenset({"broadcast", "reduce"}),
    ),
    Algorithm(
        "halving_doubling",
        "halves with partners ever farther away and back: log2 n rounds",
        {
            "all_reduce": lambda c: halving_doubling.all_reduce(c.ranks),
            "reduce_scatter": lambda c: halving_doubling.reduce_scatter(c.ranks),
            "all_gather": lambda c: halving_doubling.all_gather(c.ranks),
            "broadcast": lambda c: halving_doubling.broadcast(c.ranks, c.root),
            "reduce": lambda c: halving_doubling.reduce(c.ranks, c.root),
        },
    ),
    Algorithm(
        "recursive_doubling",
        "the whole tensor with partners ever farther away: log2 n rounds, for short ones",
        {
            "all_reduce": lambda c: halving_doubling.doubling_all_reduce(c.ranks),
            "barrier": lambda c: halving_doubling.barrier(c.ranks),
        },
    ),
    Algorithm(
        "binomial",
        "the binomial tree: log2 n rounds, for short tensors",
        {
            "all_reduce": lambda c: trees.all_reduce(c.ranks),
            "reduce": lambda c: trees.reduce(c.ranks, c.root),
            "broadcast": lambda c: trees.broadcast(c.ranks, c.root),
            "gather": lambda c: trees.gather(c.ranks, c.root),
            "scatter": lambda c: trees.scatter(c.ranks, c.root),
            "barrier": lambda c: trees.barrier(c.ranks),
        },
    ),
    Algorithm(
        "binary_tree",
        "a pipeline of segments along one binary tree",
        {
            "all_reduce": lambda c: trees.binary("all_reduce", c.ranks, 0, c.segments),
            "reduce": lambda c: trees.binary("reduce", c.ranks, c.root, c.segments),
            "broadcast": lambda c: trees.binary("broadcast", c.ranks, c.root, c.segments),
        },
        frozenset({"all_reduce", "reduce", "broadcast"}),
    ),
    Algorithm(
        "double_tree",
        "two binary trees, half of the tensor each; who is a leaf of one is inside of the other",
        {
            "all_reduce": lambda c: trees.double("all_reduce", c.ranks, 0, c.segments),
            "reduce": lambda c: trees.double("reduce", c.ranks, c.root, c.segments),
            "broadcast": lambda c: trees.double("broadcast", c.ranks, c.root, c.segments),
        },
        frozenset({"all_reduce", "reduce", "broadcast"}),
    ),
    Algorithm(
        "two_level",
        "inside of hosts, then between them by slices",
        {
            "all_reduce": _two_level(lambda c: two_level.all_reduce(c.hosts)),
            "reduce": _two_level(lambda c: two_level.reduce(c.hosts, c.root)),
            "broadcast": _two_level(lambda c: two_level.broadcast(c.hosts, c.root)),
            "reduce_scatter": _two_level(lambda c: two_level.reduce_scatter(c.hosts)),
            "all_gather": _two_level(lambda c: two_level.all_gather(c.hosts)),
            "all_to_all": lambda c: two_level.all_to_all(c.hosts),
            "gather": lambda c: two_level.gather(c.hosts, c.root),
            "scatter": lambda c: two_level.scatter(c.hosts, c.root),
            "barrier": lambda c: two_level.barrier(c.hosts),
        },
        frozenset({"all_reduce", "reduce", "broadcast", "reduce_scatter", "all_gather"}),
        uses_hosts=True,
    ),
    Algorithm(
        "two_level_ring",
        "as two_level, with rings inside of the hosts",
        {
            "all_reduce": _ring_inside(two_level.all_reduce),
            "reduce_scatter": _ring_inside(two_level.reduce_scatter),
            "all_gather": _ring_inside(two_level.all_gather),
        },
        frozenset({"all_reduce", "reduce_scatter", "all_gather"}),
        uses_hosts=True,
    ),
    Algorithm(
        "canonical",
        "the additions of Shoal's training tree over the ranks, whatever the size",
        {
            "all_reduce": lambda c: canonical.all_reduce(c.ranks),
            "reduce": lambda c: canonical.reduce(c.ranks, c.root),
            "reduce_scatter": lambda c: canonical.reduce_scatter(c.ranks),
        },
    ),
]
ALGORITHMS = {algorithm.name: algorithm for algorithm in _ALL}


def algorithms(collective: str) -> list[str]:
    """The names of those that carry out ``collective``. Raises UserError for an unknown one."""
    if collective not in COLLECTIVES:
        raise unknown_name("collective", collective, COLLECTIVES)
    return [name for name, algorithm in ALGORITHMS.items() if collective in algorithm.makes]


def build(
    collective: str,
    algorithm: str,
    ranks: int,
    *,
    hosts: Sequence[object] | None = None,
    segments: int = 1,
    root: int = 0,
    target: int = 0,
) -> Program:
    """The program of ``collective`` by ``algorithm``. Programs are kept: to ask again costs nothing.

    ``hosts[rank]`` names the host of a rank, for the algorithms that use it; None: all on one. ``segments`` is how many
    pieces follow each other through a pipeline. Raises UserError with the nearest name, or what is out of range."""
    return _build(collective, algorithm, ranks, None if hosts is None else tuple(hosts), segments, root, target)


@lru_cache(maxsize=1024)
def _build(
    collective: str,
    algorithm: str,
    ranks: int,
    hosts: tuple[object, ...] | None,
    segments: int,
    root: int,
    target: int,
) -> Program:
    known = algorithms(collective)
    if algorithm not in known:
        raise unknown_name("algorithm", algorithm, known, f"{collective} (of {ranks} ranks)")
    if ranks < 1:
        raise UserError(f"{collective} needs at least 1 rank, got {ranks}.")
    if not (0 <= root < ranks and 0 <= target < ranks):
        raise UserError(f"{collective}: root and target must be ranks from 0 to {ranks - 1}, got {root} and {target}.")
    if root and collective not in ROOTED:
        raise UserError(f"{collective} has no root: leave it out, got {root}.")
    chosen = ALGORITHMS[algorithm]
    if segments < 1 or (segments > 1 and collective not in chosen.pipelined):
        most = "at least 1 segment" if collective in chosen.pipelined else "1 segment: it is no pipeline"
        raise UserError(f"{collective} by {algorithm} takes {most}, got {segments}.")
    return chosen.makes[collective](Call(ranks, hosts_of(hosts, ranks), segments, root, target))
