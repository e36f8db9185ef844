"""The cheapest tree from (or to) a root along directed links: Chu and Liu, 1965; Edmonds, 1967. Pure."""

from collections.abc import Sequence
from typing import NamedTuple


class Arc(NamedTuple):
    source: int
    target: int
    price: float


def cheapest_tree(nodes: int, root: int, arcs: Sequence[Arc]) -> list[int] | None:
    """The places in ``arcs`` of those that make the cheapest tree from ``root`` to all nodes; None where there is none.

    Every node takes its cheapest way in; a circle of such ways becomes one node, and what leads into it is priced by
    how much dearer it is than the way that it would replace."""
    best: dict[int, int] = {}
    for place, arc in enumerate(arcs):
        if arc.target != root and arc.source != arc.target:
            known = best.get(arc.target)
            if known is None or arc.price < arcs[known].price:
                best[arc.target] = place
    if len(best) < nodes - 1:
        return None
    circle = _circle(nodes, root, {node: arcs[place].source for node, place in best.items()})
    if not circle:
        return list(best.values())
    inside = set(circle)
    names: dict[int, int] = {}
    for node in range(nodes):
        if node not in inside:
            names[node] = len(names)
    whole = len(names)
    names |= dict.fromkeys(circle, whole)
    smaller, origin = [], []
    for place, arc in enumerate(arcs):
        if arc.source in inside and arc.target in inside:
            continue
        price = arc.price - arcs[best[arc.target]].price if arc.target in inside else arc.price
        smaller.append(Arc(names[arc.source], names[arc.target], price))
        origin.append(place)
    found = cheapest_tree(whole + 1, names[root], smaller)
    if found is None:
        return None
    chosen = [origin[place] for place in found]
    entered = next(arcs[place].target for place in chosen if arcs[place].target in inside)
    return chosen + [best[node] for node in circle if node != entered]


def _circle(nodes: int, root: int, above: dict[int, int]) -> list[int]:
    """The nodes of one circle among the ways to the parents ``above``; [] when all lead to the root."""
    state = [0] * nodes  # the walk that a node was first met on
    state[root] = -1
    for start in range(nodes):
        node = start
        while state[node] == 0:
            state[node] = start + 1
            node = above[node]
        if state[node] == start + 1:  # met again on the same walk
            circle, at = [node], above[node]
            while at != node:
                circle.append(at)
                at = above[at]
            return circle
    return []
