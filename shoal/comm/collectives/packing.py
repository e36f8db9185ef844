"""Spanning trees packed over an irregular graph of links, as Blink does (Wang et al., MLSys 2020), exactly.

How many bytes a second can trees carry at once? Each tree takes its rate from every link that it uses, and from what
those links share. That is a linear programme with a column for every spanning tree. The simplex method needs only one
column at a time: the cheapest tree at the current prices of the links. When none costs less than 1, the prices prove
that no packing is faster (for broadcast, Edmonds' theorem: the smallest cut from the root; for an all-reduce over links
of equal speed both ways, that of Nash-Williams and Tutte).

Then few trees: equal ones of whole parts of the links where that comes within ``within`` of the bound, else those of
the best packing without which the rate would fall below that. An all-reduce goes up and down the same tree where links
have equal speed both ways. A message to one rank has paths for trees, by way of ranks that only pass it on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from shoal.cluster.topology import Link, Topology
from shoal.comm.collectives.actions import Add, Copy, Program, Round
from shoal.comm.collectives.arborescence import Arc, cheapest_tree
from shoal.comm.collectives.disjoint_trees import arborescences, spanning_trees
from shoal.comm.collectives.draft import Draft, merge
from shoal.comm.collectives.trees import Tree, tree_broadcast, tree_reduce
from shoal.errors import UserError, unknown_name

COLLECTIVES = ("all_reduce", "broadcast", "reduce", "send_recv")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PackedTree:
    """A spanning tree: who is whose parent on the way up (sums) and on the way down (results), and over which link."""

    root: int
    up: tuple[Link, ...]  # from each rank but the root to its parent; () where nothing is added up
    down: tuple[Link, ...]  # from its parent to each rank but the root; () for a reduce
    bytes_per_s: float  # its part of the rate

    @property
    def depth(self) -> int:
        above = {link.source: link.target for link in self.up} | {link.target: link.source for link in self.down}
        return max((_steps(rank, above) for rank in above), default=0)


@dataclass(frozen=True)
class Packing:
    collective: str
    topology: Topology
    trees: tuple[PackedTree, ...]
    bound_bytes_per_s: float  # no set of trees is faster
    target: int = 0  # of send_recv

    @property
    def bytes_per_s(self) -> float:
        """Bytes of the tensor that pass a second, when it is long."""
        return sum(tree.bytes_per_s for tree in self.trees)

    def __str__(self) -> str:
        share = f"{self.bytes_per_s / 1e9:.4g} of at most {self.bound_bytes_per_s / 1e9:.4g} GB/s"
        trees = f"{len(self.trees)} tree{'' if len(self.trees) == 1 else 's'}"
        lines = [f"{self.collective} over {self.topology.size} ranks: {trees}, {share}"]
        for tree in self.trees:
            links = [f"{link.source}>{link.target}" + (f"@{link.lane}" if link.lane else "")
                     for link in tree.down or tree.up]  # fmt: skip
            lines.append(
                f"  {tree.bytes_per_s / 1e9:7.3f} GB/s from {tree.root}, depth {tree.depth}: {' '.join(links)}"
            )
        return "\n".join(lines)


def pack(
    topology: Topology,
    collective: str = "all_reduce",
    root: int = 0,
    *,
    target: int = 0,
    lanes: Sequence[int] | None = None,
    within: float = 0.05,
) -> Packing:
    """Trees whose rates add up to at least ``1 - within`` of what any trees can reach on these links.

    ``lanes``: the lanes to use; None takes lane 0 alone where it joins all ranks, and else every lane. Raises UserError
    for a collective that is no tree's, and where the links do not join all ranks."""
    if collective not in COLLECTIVES:
        raise unknown_name("collective for trees", collective, COLLECTIVES)
    if not (0 <= root < topology.size and 0 <= target < topology.size) or (
        collective == "send_recv" and root == target
    ):
        raise UserError(f"packing: root and target must be two ranks below {topology.size}, got {root} and {target}.")
    if topology.size == 1:
        return Packing(collective, topology, (), float("inf"))
    used = topology.only(lambda link: link.lane == 0 if lanes is None else link.lane in lanes)
    if lanes is None and not _joins(used, root):
        used = topology
    if not _joins(used, root):
        raise UserError(f"packing: the links (lanes {lanes or 'all'}) do not join all {topology.size} ranks both ways.")
    problem = _Problem(used, collective, root, target)
    bound = problem.solve()
    equal = problem.equal(bound, bound * (1 - within))
    few = problem.few(bound * (1 - within)) if not equal or len(equal) > 1 else ()
    trees = min((found for found in (equal, few) if found), key=len)
    return Packing(collective, topology, trees, bound, target)


def program(packing: Packing, segments: int = 1) -> Program:
    """The collective along the packed trees, each a pipeline of ``segments`` pieces of its share of the tensor."""
    if segments < 1:
        raise UserError(f"packed_trees takes at least 1 segment, got {segments}.")
    ranks, root = packing.topology.size, packing.trees[0].root if packing.trees else 0
    root = root if packing.collective != "all_reduce" else 0
    if not packing.trees:
        return Draft(ranks, 1).program(packing.collective, "packed_trees", root=root)
    parts = [_along(packing, tree, ranks, segments) for tree in packing.trees]
    return merge(parts, "packed_trees", _whole([tree.bytes_per_s for tree in packing.trees]))


def _whole(rates: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the rates, to a thousandth of the largest."""
    return [max(1, round(Fraction(rate / max(rates)).limit_denominator(1000) * 1000)) for rate in rates]


def _along(packing: Packing, tree: PackedTree, ranks: int, segments: int) -> Program:
    draft, chunks, step, collective = Draft(ranks, segments), range(segments), 0, packing.collective
    lanes = {(link.source, link.target): link.lane for link in (*tree.up, *tree.down)}
    if tree.up:
        step = tree_reduce(draft, _as_tree(ranks, tree.root, {link.source: link.target for link in tree.up}), chunks)
    if collective == "send_recv":
        for hop, link in enumerate(tree.down):
            for place in chunks:
                draft.message(hop + place, link.source, link.target, place)
    elif tree.down:
        below = _as_tree(ranks, tree.root, {link.target: link.source for link in tree.down})
        tree_broadcast(draft, below, chunks, step)
    root = tree.root if collective != "all_reduce" else 0
    return _on_lanes(draft.program(collective, "packed_trees", root=root, target=packing.target), lanes)


def _as_tree(ranks: int, root: int, above: dict[int, int]) -> Tree:
    below: list[list[int]] = [[] for _ in range(ranks)]
    for rank in sorted(above):
        below[above[rank]].append(rank)
    parents = tuple(-1 if rank == root else above[rank] for rank in range(ranks))
    return Tree(parents, ((),) * ranks, tuple(map(tuple, below)))


def _on_lanes(made: Program, lanes: dict[tuple[int, int], int]) -> Program:
    if not any(lanes.values()):
        return made

    def moved(rank: int, actions: Round) -> Round:
        out = []
        for action in actions:
            if not isinstance(action, Add | Copy):
                ends = (action.origin, rank) if hasattr(action, "origin") else (rank, action.to)
                action = replace(action, lane=lanes[ends])
            out.append(action)
        return tuple(out)

    rounds = tuple(tuple(moved(rank, actions) for actions in part) for rank, part in enumerate(made.rounds))
    return replace(made, rounds=rounds)


def _steps(rank: int, above: dict[int, int]) -> int:
    steps = 0
    while rank in above:
        rank, steps = above[rank], steps + 1
    return steps


def _joins(topology: Topology, root: int) -> bool:
    """Whether the links lead from the root to every rank and back."""
    for forward in (True, False):
        met, open_ = {root}, [root]
        while open_:
            at = open_.pop()
            for link in topology.links:
                near, far = (link.source, link.target) if forward else (link.target, link.source)
                if near == at and far not in met:
                    met.add(far)
                    open_.append(far)
        if len(met) < topology.size:
            return False
    return True


MOST_EQUAL_TREES = 12
Chosen = tuple[int, tuple[int, ...], tuple[int, ...]]  # root, places of the links up, places of the links down


class _Problem:
    """Maximise the sum of the trees' rates; a row for each link that nothing it goes through limits more, and for each
    capacity. The revised simplex method; capacities are moved a little apart so that it never stands still."""

    def __init__(self, topology: Topology, collective: str, root: int, target: int) -> None:
        self.topology, self.collective, self.root, self.target = topology, collective, root, target
        self.links = topology.links
        rates = topology.rates
        limits: list[float] = []
        rows: dict[str, int] = {}
        self.rows_of: list[list[int]] = []
        for link in self.links:
            own = []
            for name in link.through:
                if name not in rows:
                    rows[name] = len(limits)
                    limits.append(rates[name])
                own.append(rows[name])
            if not any(rates[name] <= link.bytes_per_s for name in link.through):
                own.append(len(limits))
                limits.append(link.bytes_per_s)
            self.rows_of.append(own)
        self.scale = max(limits)
        self.limits = np.array(limits) / self.scale
        both = {(link.source, link.target, link.lane): link.bytes_per_s for link in self.links}
        self.alike = not topology.capacities and all(
            both.get((link.target, link.source, link.lane)) == link.bytes_per_s for link in self.links
        )
        self.back = {(link.target, link.source, link.lane): place for place, link in enumerate(self.links)}
        self.columns: list[Chosen] = []
        self.uses: list[Floats] = []

    def solve(self) -> float:
        """Finds the trees of a best packing; returns its rate, in bytes a second, as the prices prove it."""
        spread = 1 + 1e-6 * np.random.default_rng(0).random(len(self.limits))
        prices = self._simplex(self.limits * spread, self._cheapest)
        cheapest = self._price(self._tree(prices), prices)
        return float(prices @ self.limits) / cheapest * self.scale

    def few(self, at_least: float) -> tuple[PackedTree, ...]:
        """The trees that are in use, and of those as few as still reach ``at_least`` bytes a second."""
        kept = {place: rate for place, rate in self._rates(range(len(self.columns))).items() if rate > 1e-6}
        while len(kept) > 1:
            for place in sorted(kept, key=lambda place: kept[place]):
                rest = self._rates([other for other in kept if other != place])
                if sum(rest.values()) * self.scale >= at_least:
                    kept = {other: rate for other, rate in rest.items() if rate > 1e-6}
                    break
            else:
                break
        trees = [self._packed(self.columns[place], rate * self.scale) for place, rate in kept.items()]
        return tuple(sorted(trees, key=lambda tree: -tree.bytes_per_s))

    def equal(self, bound: float, at_least: float) -> tuple[PackedTree, ...]:
        """The fewest trees of one rate that reach ``at_least``, each on whole parts of links; () if there are none."""
        irregular = self.collective == "all_reduce" and not self.alike
        if self.topology.capacities or irregular or self.collective == "send_recv":
            return ()
        rates = sorted({link.bytes_per_s for link in self.links})
        for count in range(1, MOST_EQUAL_TREES + 1):
            parts = {rate / whole for rate in rates for whole in range(1, count + 1)}
            for part in sorted((p for p in parts if at_least <= count * p <= bound * (1 + 1e-9)), reverse=True):
                found = self._disjoint(part, count)
                if found is not None:
                    return tuple(self._packed(chosen, part) for chosen in found)
        return ()

    def _disjoint(self, part: float, count: int) -> list[Chosen] | None:
        size, root = self.topology.size, self.root
        ways = [
            place for place, link in enumerate(self.links) for _ in range(int(link.bytes_per_s / part * (1 + 1e-9)))
        ]
        if self.collective == "all_reduce":
            ways = [place for place in ways if self.links[place].source < self.links[place].target]
        ends = [(self.links[place].source, self.links[place].target) for place in ways]
        if self.collective == "all_reduce":
            trees = spanning_trees(size, ends, count)
            return None if trees is None else [self._centred([ways[way] for way in tree]) for tree in trees]
        up = self.collective == "reduce"
        trees = arborescences(size, root, [(target, source) for source, target in ends] if up else ends, count)
        if trees is None:
            return None
        sets = [tuple(ways[way] for way in tree) for tree in trees]
        return [(root, links, ()) if up else (root, (), links) for links in sets]

    def _packed(self, chosen: Chosen, rate: float) -> PackedTree:
        root, up, down = chosen
        return PackedTree(
            root, tuple(self.links[place] for place in up), tuple(self.links[place] for place in down), rate
        )

    def _rates(self, places: Sequence[int]) -> dict[int, float]:
        """The best rates of these trees alone."""
        order = list(places)

        def cheapest(prices: Floats) -> tuple[int, float]:
            costs = [float(self.uses[place] @ prices) for place in order]
            least = int(np.argmin(costs))
            return order[least], costs[least]

        spread = 1 + 1e-6 * np.random.default_rng(1).random(len(self.limits))
        self._simplex(self.limits * spread, cheapest)
        found = {place: max(0.0, rate) for place, rate in self.result.items()}
        load = sum((rate * self.uses[place] for place, rate in found.items()), np.zeros(len(self.limits)))
        over = max(1.0, float(np.max(load / self.limits)))
        return {place: rate / over for place, rate in found.items()}

    def _simplex(self, limits: Floats, cheapest: Callable[[Floats], tuple[int, float]]) -> Floats:
        """``cheapest(prices)`` gives the place of the best column and its price. Sets ``result``; gives the prices."""
        count = len(limits)
        inverse = np.eye(count)
        basis = [-1 - row for row in range(count)]  # a tree's place, or -1 - row for what is left of a limit
        amounts = limits.copy()
        while True:
            gains = np.array([1.0 if name >= 0 else 0.0 for name in basis])
            prices = gains @ inverse
            lowest = int(np.argmin(prices))
            if prices[lowest] < -1e-9:
                entering, column = -1 - lowest, np.eye(count)[lowest]
            else:
                place, cost = cheapest(np.maximum(prices, 0.0))
                if cost >= 1 - 1e-9:
                    break
                entering, column = place, self.uses[place]
            change = inverse @ column
            steps = np.full(count, np.inf)
            np.divide(amounts, change, out=steps, where=change > 1e-9)
            leaving = int(np.argmin(steps))
            inverse[leaving] /= change[leaving]
            step = steps[leaving]
            for row in range(count):
                if row != leaving and change[row]:
                    inverse[row] -= change[row] * inverse[leaving]
            amounts -= step * change
            amounts[leaving] = step
            basis[leaving] = entering
        exact = inverse @ self.limits
        self.result = {name: float(amount) for name, amount in zip(basis, exact, strict=True) if name >= 0}
        return np.maximum(prices, 0.0)

    # ---- the cheapest tree at given prices

    def _cheapest(self, prices: Floats) -> tuple[int, float]:
        chosen = self._tree(prices)
        uses = np.zeros(len(self.limits))
        for place in (*chosen[1], *chosen[2]):
            for row in self.rows_of[place]:
                uses[row] += 1
        self.columns.append(chosen)
        self.uses.append(uses)
        return len(self.columns) - 1, float(uses @ prices)

    def _price(self, chosen: Chosen, prices: Floats) -> float:
        return sum(float(prices[row]) for place in (*chosen[1], *chosen[2]) for row in self.rows_of[place])

    def _tree(self, prices: Floats) -> Chosen:
        costs = [sum(float(prices[row]) for row in rows) for rows in self.rows_of]
        if self.collective == "broadcast":
            return self.root, (), self._one_way(costs, self.root, down=True)
        if self.collective == "reduce":
            return self.root, self._one_way(costs, self.root, down=False), ()
        if self.collective == "send_recv":
            return self.root, (), self._path(costs)
        if self.alike:
            both = [costs[place] + costs[self._reverse(place)] for place in range(len(costs))]
            down = self._one_way(both, self.root, down=True)
            return self._centred(down)
        found = []
        for root in range(self.topology.size):
            up, down = self._one_way(costs, root, down=False), self._one_way(costs, root, down=True)
            found.append((sum(costs[place] for place in (*up, *down)), (root, up, down)))
        return min(found)[1]

    def _reverse(self, place: int) -> int:
        link = self.links[place]
        return self.back[link.source, link.target, link.lane]

    def _one_way(self, costs: Sequence[float], root: int, *, down: bool) -> tuple[int, ...]:
        arcs = [
            Arc(link.source, link.target, cost) if down else Arc(link.target, link.source, cost)
            for link, cost in zip(self.links, costs, strict=True)
        ]
        found = cheapest_tree(self.topology.size, root, arcs)
        if found is None:
            raise AssertionError("the links join all ranks: that was looked at before")
        return tuple(sorted(found))

    def _path(self, costs: Sequence[float]) -> tuple[int, ...]:
        """The cheapest way from root to target; of equally cheap ones, the one with the fewest links."""
        best: dict[int, tuple[float, int, tuple[int, ...]]] = {
            self.root: (0.0, 0, ())
        }  # by rank: price, links, their places
        open_ = [self.root]
        while open_:
            at = open_.pop(0)
            price, count, way = best[at]
            for place, link in enumerate(self.links):
                offer = (price + costs[place], count + 1)
                if link.source == at and (link.target not in best or offer < best[link.target][:2]):
                    best[link.target] = (*offer, (*way, place))
                    open_.append(link.target)
        return best[self.target][2]

    def _centred(self, down: Sequence[int]) -> Chosen:
        """The same tree from its middle, which makes it shallow."""
        near: dict[int, list[int]] = {}
        for place in down:
            for one in (place, self._reverse(place)):
                near.setdefault(self.links[one].source, []).append(one)

        def hung(root: int) -> tuple[int, list[int]]:
            """Depth, and the links away from ``root``."""
            depth, away, level, met = 0, list[int](), [root], {root}
            while True:
                ways = [place for rank in level for place in near[rank] if self.links[place].target not in met]
                if not ways:
                    return depth, away
                level = [self.links[place].target for place in ways]
                met.update(level)
                away += ways
                depth += 1

        root = min(range(self.topology.size), key=lambda rank: hung(rank)[0])
        away = tuple(sorted(hung(root)[1]))
        return root, tuple(sorted(self._reverse(place) for place in away)), away
