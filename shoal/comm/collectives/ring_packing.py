"""Rings that share no link, over an irregular graph of links: what NCCL makes of a DGX-1."""

from collections.abc import Iterator, Sequence
from itertools import islice

from shoal.cluster.topology import Topology
from shoal.comm.collectives import ring
from shoal.comm.collectives.actions import Program
from shoal.comm.collectives.draft import merge, relabel

MOST_CYCLES = 4000  # that are looked at; a DGX-1 has fewer
MOST_STEPS = 200_000  # of the search for a largest set


def rings(topology: Topology) -> list[tuple[int, ...]]:
    """Orders of the ranks, each a ring over links of lane 0 that is used both ways; a link of several times the slowest
    rate is several. As many as there can be (as far as the search goes); [] where lane 0 has no ring of all ranks."""
    rates = {(link.source, link.target): link.bytes_per_s for link in topology.links if link.lane == 0}
    both = {ends: min(rate, rates[ends[::-1]]) for ends, rate in rates.items() if ends[::-1] in rates}
    if not both:
        return []
    part = min(both.values())
    copies = {ends: int(rate / part + 1e-9) for ends, rate in both.items()}
    if topology.size == 2:
        return [(0, 1)] * copies.get((0, 1), 0)
    cycles = list(islice(_cycles(topology.size, copies), MOST_CYCLES))
    most = min(sum(n for (a, _), n in copies.items() if a == rank) // 2 for rank in range(topology.size))
    return _largest_set(cycles, copies, most)


def program(collective: str, topology: Topology, orders: Sequence[tuple[int, ...]]) -> Program:
    """all_reduce, reduce_scatter or all_gather over these rings, each once in each direction, at equal shares."""
    makers = {"all_reduce": ring.all_reduce, "reduce_scatter": ring.reduce_scatter, "all_gather": ring.all_gather}
    one = makers[collective](topology.size)
    ways = orders if topology.size == 2 else [way for order in orders for way in (order, (order[0], *order[:0:-1]))]
    return merge([relabel(one, way) for way in ways], "rings")


def _cycles(size: int, copies: dict[tuple[int, int], int]) -> Iterator[tuple[int, ...]]:
    """Every ring of all ranks once: it begins at 0, and goes towards the smaller of its neighbours there."""
    near: list[list[int]] = [[b for b in range(size) if copies.get((a, b))] for a in range(size)]

    def grow(path: list[int]) -> Iterator[tuple[int, ...]]:
        if len(path) == size:
            if 0 in near[path[-1]] and path[1] < path[-1]:
                yield tuple(path)
            return
        for step in near[path[-1]]:
            if step not in path:
                yield from grow([*path, step])

    return grow([0])


def _largest_set(cycles: list[tuple[int, ...]], copies: dict[tuple[int, int], int], most: int) -> list[tuple[int, ...]]:
    best: list[tuple[int, ...]] = []
    steps = 0

    def ends_of(cycle: tuple[int, ...]) -> list[tuple[int, int]]:
        return [(min(a, b), max(a, b)) for a, b in zip(cycle, (*cycle[1:], cycle[0]), strict=True)]

    edges = [ends_of(cycle) for cycle in cycles]
    left = {ends: count for ends, count in copies.items() if ends[0] < ends[1]}

    def grow(first: int, chosen: list[int]) -> None:
        nonlocal best, steps
        if len(chosen) > len(best):
            best = [cycles[place] for place in chosen]
        for place in range(first, len(cycles)):
            steps += 1
            if len(best) >= most or steps > MOST_STEPS:
                return
            if all(left[ends] for ends in edges[place]):
                for ends in edges[place]:
                    left[ends] -= 1
                grow(place, [*chosen, place])
                for ends in edges[place]:
                    left[ends] += 1

    grow(0, [])
    return best
