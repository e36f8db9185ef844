"""Which algorithm: the one whose program is predicted to end first on the topology at hand.

    choose("all_reduce", 64 << 20, Topology.preset("dgx1-v100", range(6))).why

Predictions come from the cost model, with the numbers of the topology: probe it (`shoal.comm.probe`) rather than assume
them. Where a probe has also timed the backend's own collective, or has seen by how much an algorithm misses its
prediction, that counts too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any

from shoal.cluster.topology import Topology
from shoal.comm.collectives import multipath, packing, ring_packing
from shoal.comm.collectives.actions import COLLECTIVES, ROOTED, Program
from shoal.comm.collectives.cost import cost
from shoal.comm.collectives.curves import Curve
from shoal.comm.collectives.registry import ALGORITHMS, algorithms, build
from shoal.errors import UserError, unknown_name

MOST_SEGMENTS = 128
SMALLEST_SEGMENT = 4096  # bytes
OWN = 0.9  # a backend's own collective is left only for a program that is predicted to take less than this of its time
PACKED, RINGS, MULTIPATH = "packed_trees", "rings", "multipath"


@dataclass(frozen=True)
class Option:
    algorithm: str
    segments: int
    predicted_s: float

    def __str__(self) -> str:
        return f"{self.algorithm}{f' in {self.segments} segments' if self.segments > 1 else ''}"


@dataclass(frozen=True)
class Choice:
    collective: str
    nbytes: int  # of the whole vector on a rank
    algorithm: str
    segments: int
    predicted_s: float
    why: str  # one sentence
    alternatives: tuple[Option, ...]  # the best of each other algorithm, fastest first
    _make: Callable[[], Program | None] = field(repr=False, compare=False)

    @cached_property
    def program(self) -> Program | None:
        """What the ranks do; None where the backend's own collective is the choice."""
        return self._make()

    def __str__(self) -> str:
        lines = [f"{self.collective} of {_bytes(self.nbytes)}: {self.why}"]
        for option in (Option(self.algorithm, self.segments, self.predicted_s), *self.alternatives):
            lines.append(f"  {_seconds(option.predicted_s):>9}  {option}")
        return "\n".join(lines)


def choose(
    collective: str,
    nbytes: int,
    topology: Topology,
    *,
    root: int = 0,
    target: int = 0,
    itemsize: int = 4,
    half: bool = False,
    only: Sequence[str] | None = None,
    segments: int | None = None,
    curves: Sequence[Curve] = (),
    corrections: Mapping[str, Curve] | None = None,
) -> Choice:
    """The fastest algorithm for ``nbytes`` (the whole vector on a rank, as in ``cost``), as predicted.

    ``only``: the algorithms to consider, so that one name pins it; ``segments`` pins those. ``curves``: measured times
    of the backend's own collectives; ``corrections``: measured over predicted seconds of algorithms, by
    "collective/algorithm". Raises UserError for unknown names, with the nearest, and when nothing is left to choose."""
    if collective not in COLLECTIVES:
        raise unknown_name("collective", collective, COLLECTIVES)
    if nbytes < 0 or itemsize < 1:
        raise UserError(f"{collective}: nbytes must be at least 0 and itemsize at least 1, got {nbytes}, {itemsize}.")
    asked = _Asked(collective, nbytes, topology, root, target, itemsize, half)
    makers = _makers(collective, topology, root, target)
    native = {curve.name: curve for curve in curves if curve.collective == collective}
    several = [MULTIPATH] if topology.lanes > 1 and topology.size > 1 and nbytes else []
    wanted = [*makers, *native, *several] if only is None else list(only)
    if not wanted:
        raise UserError(f"{collective}: no algorithm to choose from: name at least one, or leave them out.")
    for name in wanted:
        if name not in (*makers, *native, *several):
            if name in (PACKED, RINGS, MULTIPATH) or name in ALGORITHMS:
                raise UserError(f"{collective} by {name} cannot run on these {topology.size} ranks and links.")
            raise unknown_name("algorithm", name, [*makers, *native], f"{collective} (of {topology.size} ranks)")
    found: list[_Candidate] = []
    for name in makers if wanted == several else wanted:
        if name in native:
            found.append(_Candidate(Option(name, 1, native[name].seconds(nbytes)), _nothing))
        elif name in makers:
            option = asked.best(name, makers[name], segments)
            factor = (corrections or {}).get(f"{collective}/{name}")
            times = factor.seconds(nbytes) if factor else 1.0
            option = replace(option, predicted_s=option.predicted_s * times)
            found.append(_Candidate(option, partial(makers[name][0], option.segments)))
    found.sort(
        key=lambda candidate: candidate.option.predicted_s * (OWN if candidate.option.algorithm in native else 1)
    )
    if MULTIPATH in wanted:
        split = _over_lanes(asked, [each for each in found if each.option.algorithm in makers][:2])
        found = split if wanted == several else [*split, *found] if _sooner(split, found) else [*found, *split]
    if not found:
        raise UserError(f"{collective}: no algorithm to choose from: a second lane gains less than 5 % here.")
    first, others = found[0].option, tuple(candidate.option for candidate in found[1:])
    why = _why(asked, first, others, found[0].make(), pinned=only is not None)
    return Choice(collective, nbytes, first.algorithm, first.segments, first.predicted_s, why, others, found[0].make)


def plan(collective: str, nbytes: int, topology: Any, algorithm: str = "auto", **rest: Any) -> Choice:
    """As ``choose``, from a Topology or from what ``probe`` returned, which knows more; ``algorithm`` pins one."""
    probed = {} if isinstance(topology, Topology) else {"curves": topology.curves, "corrections": topology.corrections}
    links = topology if isinstance(topology, Topology) else topology.topology
    only = None if algorithm == "auto" else (algorithm,)
    return choose(collective, nbytes, links, only=only, **probed, **rest)


Maker = tuple[Callable[[int], Program], bool]  # (program of so many segments, whether more than one makes sense)


def _makers(collective: str, topology: Topology, root: int, target: int) -> dict[str, Maker]:
    """The algorithms that can run on these links."""
    size, several_hosts = topology.size, len(topology.host_names) > 1
    at: dict[str, int] = {"root": root, "target": target} if collective in ROOTED else {}
    makers: dict[str, Maker] = {}
    for name in algorithms(collective):
        known = ALGORITHMS[name]
        if known.uses_hosts and (not several_hosts or len(topology.host_names) == size):
            continue

        def registered(segments: int, name: str = name) -> Program:
            return build(collective, name, size, hosts=topology.hosts, segments=segments, **at)

        makers[name] = (registered, collective in known.pipelined)
    if size > 1 and not several_hosts and _irregular(topology):
        orders = ring_packing.rings(topology) if collective in ("all_reduce", "reduce_scatter", "all_gather") else []
        if orders:
            makers[RINGS] = (lambda segments: ring_packing.program(collective, topology, orders), False)
        if collective in packing.COLLECTIVES:
            trees = lru_cache(maxsize=1)(lambda: packing.pack(topology, collective, root))
            makers[PACKED] = (lambda segments: packing.program(trees(), segments), True)
    return makers


@dataclass(frozen=True)
class _Candidate:
    option: Option
    make: Callable[[], Program | None]


def _sooner(split: Sequence[_Candidate], found: Sequence[_Candidate]) -> bool:
    return bool(split) and split[0].option.predicted_s < found[0].option.predicted_s


def _nothing() -> None:
    """The program of a backend's own collective."""


def _over_lanes(asked: "_Asked", best: Sequence[_Candidate]) -> list[_Candidate]:
    """Single-lane algorithms on all lanes at once, with shares that end together; those that gain by it."""
    found = []
    for candidate in best:
        base = candidate.make()
        if base is None or base.lanes > 1 or not base.length:
            continue
        others = [multipath.over_lane(base, asked.topology, lane) for lane in range(1, asked.topology.lanes)]
        programs = [base, *(program for program in others if program.lanes > 1)]
        parts = multipath.fit(programs, asked.nbytes, asked.topology).split(asked.nbytes)
        if sum(part > 0 for part in parts) < 2:
            continue
        whole = multipath.program(programs, parts)
        alone, together = candidate.option.predicted_s, asked.seconds(whole)
        if together < (1 - multipath.WORTHWHILE) * alone:
            option = Option(MULTIPATH, candidate.option.segments, together)
            found.append(_Candidate(option, partial(_given, whole)))
    return sorted(found, key=lambda each: each.option.predicted_s)[:1]


def _given(program: Program) -> Program:
    return program


def _irregular(topology: Topology) -> bool:
    """Whether links of lane 0 are missing, or differ in speed: then it matters which way bytes go."""
    rates = {link.bytes_per_s for link in topology.links if link.lane == 0}
    count = sum(link.lane == 0 for link in topology.links)
    return count < topology.size * (topology.size - 1) or max(rates) > 1.25 * min(rates)


@dataclass(frozen=True)
class _Asked:
    collective: str
    nbytes: int
    topology: Topology
    root: int
    target: int
    itemsize: int
    half: bool

    def seconds(self, program: Program) -> float:
        return cost(program, self.nbytes, self.topology, itemsize=self.itemsize, half=self.half).seconds

    def best(self, name: str, maker: Maker, pinned: int | None) -> Option:
        """The number of segments that ends first; more are tried for as long as they help."""
        make, pipelined = maker
        if pinned is not None or not pipelined:
            count = pinned or 1
            return Option(name, count, self.seconds(make(count)))
        tried: dict[int, Option] = {}

        def attempt(count: int) -> Option:
            if count not in tried:
                tried[count] = Option(name, count, self.seconds(make(count)))
            return tried[count]

        best = attempt(1)
        most = min(MOST_SEGMENTS, self.nbytes // SMALLEST_SEGMENT)
        for count in (4, 16, 64):  # in strides of 4, then the powers of 2 beside the best
            if count > most or attempt(count).predicted_s > best.predicted_s:
                break
            best = attempt(count)
        for count in (best.segments // 2, best.segments * 2):
            if 1 <= count <= most:
                best = min(best, attempt(count), key=lambda option: option.predicted_s)
        return best


def _why(asked: _Asked, first: Option, others: tuple[Option, ...], program: Program | None, *, pinned: bool) -> str:
    what = f"{_bytes(asked.nbytes)} over {_count(asked.topology.size, 'rank')}"
    if program is None:
        ground = f"the backend's own {asked.collective} of {what} was measured to take {_seconds(first.predicted_s)}"
    else:
        spent = cost(program, asked.nbytes, asked.topology, itemsize=asked.itemsize, half=asked.half)
        if not spent.seconds:
            ground = f"{what} move nothing"
        elif spent.bound_by == "latency":
            rounds = f"{_count(program.length, 'round')} of messages"
            ground = f"{what} are bound by latency ({rounds}, {_seconds(first.predicted_s)})"
        else:
            ground = f"{what} are bound by bandwidth ({spent.bytes_per_s / 1e9:.3g} GB/s)"
    if pinned and not others:
        return f"{first}: asked for; {ground}."
    if not others:
        return f"{first}: the only algorithm; {ground}."
    second = others[0]
    times = second.predicted_s / first.predicted_s if first.predicted_s else 1.0
    rest = f"{second} would take {times:.2g}x" if times >= 1.05 else f"{second} would take as long"
    return f"{first}: {ground}; {rest}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bytes(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} bytes"


def _seconds(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} us"
