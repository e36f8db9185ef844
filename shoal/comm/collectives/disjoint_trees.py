"""Spanning trees that share no link, as many as there are: of whole links, so that few trees carry much. Pure.

Undirected: Roskind and Tarjan, 1985 (each edge goes to the forest that takes it, by way of edges that make room).
Directed from a root: Lovász, 1976 (a tree may take an arc as long as what is left still holds the trees to come).
"""

from collections import deque
from collections.abc import Sequence

Ends = tuple[int, int]


def spanning_trees(nodes: int, edges: Sequence[Ends], count: int) -> list[list[int]] | None:
    """``count`` spanning trees of an undirected multigraph, as places in ``edges``, none used twice; None where there
    are not so many."""
    forests: list[set[int]] = [set() for _ in range(count)]
    home: dict[int, int] = {}
    for new in range(len(edges)):
        _insert(nodes, edges, forests, home, new)
    if any(len(forest) < nodes - 1 for forest in forests):
        return None
    return [sorted(forest) for forest in forests]


def _insert(nodes: int, edges: Sequence[Ends], forests: list[set[int]], home: dict[int, int], new: int) -> None:
    """Puts the edge into a forest, if others can make room for it."""
    came_from: dict[int, int] = {new: -1}
    waiting = deque([new])
    while waiting:
        edge = waiting.popleft()
        for number, forest in enumerate(forests):
            if home.get(edge) == number:
                continue
            way = _way(nodes, edges, forest, *edges[edge])
            if way is None:  # it joins two parts of the forest: everybody on the way here moves up
                while True:
                    left = home.get(edge)
                    if left is not None:
                        forests[left].discard(edge)
                    forests[number].add(edge)
                    home[edge] = number
                    edge = came_from[edge]
                    if left is None:
                        return
                    number = left
            for other in way:
                if other not in came_from:
                    came_from[other] = edge
                    waiting.append(other)


def _way(nodes: int, edges: Sequence[Ends], forest: set[int], start: int, end: int) -> list[int] | None:
    """The edges of the forest between two nodes; None when it does not join them."""
    near: list[list[tuple[int, int]]] = [[] for _ in range(nodes)]
    for place in forest:
        a, b = edges[place]
        near[a].append((b, place))
        near[b].append((a, place))
    came: dict[int, tuple[int, int]] = {start: (-1, -1)}
    waiting = deque([start])
    while waiting:
        at = waiting.popleft()
        if at == end:
            way = []
            while at != start:
                at, place = came[at]
                way.append(place)
            return way
        for other, place in near[at]:
            if other not in came:
                came[other] = (at, place)
                waiting.append(other)
    return None


def arborescences(nodes: int, root: int, arcs: Sequence[Ends], count: int) -> list[list[int]] | None:
    """``count`` trees from the root to all nodes, as places in ``arcs``, none used twice; None where there are not so
    many. Each grows from the root in breadth, which keeps it shallow."""
    left = set(range(len(arcs)))
    if any(_flow(nodes, arcs, left, root, node, count) < count for node in range(nodes) if node != root):
        return None
    trees = []
    for to_come in reversed(range(count)):
        reached, tree = {root: 0}, list[int]()
        while len(reached) < nodes:
            ways = [p for p in left if arcs[p][0] in reached and arcs[p][1] not in reached]
            for place in sorted(ways, key=lambda place: (reached[arcs[place][0]], place)):
                left.remove(place)
                if _flow(nodes, arcs, left, root, arcs[place][1], to_come) == to_come:
                    tree.append(place)
                    reached[arcs[place][1]] = reached[arcs[place][0]] + 1
                    break
                left.add(place)
        trees.append(sorted(tree))
    return trees


def _flow(nodes: int, arcs: Sequence[Ends], usable: set[int], source: int, sink: int, enough: int) -> int:
    """How many ways without a common arc lead from source to sink, counted up to ``enough``."""
    near: list[list[int]] = [[] for _ in range(nodes)]
    for place in usable:
        near[arcs[place][0]].append(place)
        near[arcs[place][1]].append(place)
    forward = dict.fromkeys(usable, True)  # whether the arc is still free, to be gone along; else it may be gone back
    found = 0
    while found < enough:
        came: dict[int, int] = {source: -1}
        waiting = deque([source])
        while waiting and sink not in came:
            at = waiting.popleft()
            for place in near[at]:
                start, end = arcs[place]
                if forward[place] != (start == at):
                    continue
                other = end if start == at else start
                if other not in came:
                    came[other] = place
                    waiting.append(other)
        if sink not in came:
            return found
        at = sink
        while at != source:
            place = came[at]
            start, end = arcs[place]
            at = start if forward[place] else end
            forward[place] = not forward[place]
        found += 1
    return found
