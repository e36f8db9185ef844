"""Measure the links of a process group: latency and rate of each pair, what pairs share, and what an addition takes.

    probed = shoal.comm.probe(group)          # every rank of the group calls it; a second or two
    print(probed)
    shoal.comm.plan("all_reduce", 64 << 20, probed).why

Pairs play ping-pong while the others wait; then all ranks run a few programs at once, which shows what they share (the
processors of a host, a network card). A fit makes one topology of it, under which the cost model predicts those times;
how far it misses them is the residual. The backend's own collectives are timed too, at a few sizes, for comparison.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from shoal.cluster.detect import usable_cores
from shoal.cluster.topology import MEMORY, NETWORK, Capacity, Link, Topology, read_json
from shoal.comm.collectives import torch_own
from shoal.comm.collectives.actions import Program, block_sizes
from shoal.comm.collectives.choose import Option, choose
from shoal.comm.collectives.curves import Curve
from shoal.comm.collectives.execute import carry_out
from shoal.comm.collectives.pick import hosts_of
from shoal.comm.collectives.registry import ALGORITHMS, build
from shoal.comm.layout import ALIGNMENT
from shoal.comm.measuring.link_fit import Fitted, Observation, fit
from shoal.comm.transports.contract import Message, drive
from shoal.comm.transports.torch_group import TorchGroup
from shoal.errors import UserError
from shoal.recipe.typed import from_mapping, to_mapping

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SMALL, LARGE = 64, 1 << 20  # bytes of a ping-pong
ALL_PAIRS = 6  # up to so many ranks every pair plays; beyond, one pair of each two hosts stands for the rest
TOGETHER = (  # what all ranks run at once
    ("all_gather", "ring"),
    ("all_gather", "direct"),
    ("reduce_scatter", "ring"),
    ("reduce_scatter", "direct"),
    ("broadcast", "binomial"),
)
SIZES = (1 << 10, 1 << 16, 1 << 21)
FEWEST_TURNS, MOST_TURNS = 2, 200
CLOSE = 1.5  # times the least, so far: not the best, where it takes longer
TUNED_SIZES = tuple(1 << power for power in (10, 12, 14, 16, 18, 20, 22, 23))
NATIVE_SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 23)
ITEMSIZE = 4  # float32
FAR = 3.0  # algorithms predicted to take more than this times the best are not tuned: they will not be chosen


@dataclass(frozen=True, eq=False)
class Probed:
    """What was measured. Seconds and bytes a second; predictions of ``residual`` 0.1 miss by 10 % in the median."""

    topology: Topology
    residual: float
    backend: str
    seconds: float  # that measuring took
    curves: tuple[Curve, ...] = ()  # of the backend's own collectives
    corrections: Mapping[str, Curve] = field(default_factory=dict)  # "collective/algorithm": measured over predicted

    def __str__(self) -> str:
        lines = [
            f"probed over {self.backend} in {self.seconds:.1f} s; predictions miss by {self.residual:.0%} (median)"
        ]
        lines.append(str(self.topology))
        t = self.topology
        lines.append(f"  a message costs {t.message_s * 1e6:.3g} us of a processor at each end; adding "
                     f"{_rate(t.reduce_s_per_byte)}, copying {_rate(t.copy_s_per_byte)}")  # fmt: skip
        for curve in self.curves:
            points = (
                f"{size} B {seconds * 1e6:.4g} us" for size, seconds in zip(curve.sizes, curve.values, strict=True)
            )
            lines.append(f"  {curve.name} {curve.collective}: {', '.join(points)}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(to_mapping(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "Probed":
        """Raises UserError naming the file and what is wrong in it."""
        return from_mapping(Probed, read_json(Path(path)), str(path))


def undisturbed(times: Sequence[float]) -> float:
    """The shortest: what other work on the machine adds only ever makes times longer."""
    return min(times)


def usual(times: Sequence[float]) -> float:
    """The lower quartile: what other work adds is left out, and what an algorithm itself takes in one turn of many is
    not. Messages between two that find their receivers waiting may take a tenth of what they usually do."""
    return sorted(times)[len(times) // 4]


def _rate(s_per_byte: float) -> str:
    return f"{1 / s_per_byte / 1e9:.3g} GB/s" if s_per_byte else "costs nothing"


def probe(
    group: "ProcessGroup | Sequence[ProcessGroup] | None" = None,
    *,
    curves: Sequence[str] = ("all_reduce", "broadcast", "all_gather", "reduce_scatter"),
    tune: Sequence[str] = (),
    seconds: float = 1.5,
) -> Probed:
    """Measure the links between the ranks of ``group``; several groups of the same ranks are lanes. All ranks call it.

    ``curves``: the collectives whose own version of the backend is timed. ``tune``: the collectives whose algorithms
    are timed as well, so that their predictions are corrected; it takes about ``seconds`` more for each. ``seconds``:
    about how long measuring links may take. Raises UserError in a process that is not a member, RunFailed for a lost
    peer."""
    transport = TorchGroup(list(group) if isinstance(group, list | tuple) else [group])  # type: ignore[list-item]
    return _Probe(transport, seconds).run(curves, tune)


class _Probe:
    def __init__(self, transport: TorchGroup, seconds: float) -> None:
        self.transport, self.seconds = transport, seconds
        self.group = transport.groups[0]
        self.rank, self.size = transport.rank, transport.size
        self.backend = dist.get_backend(self.group)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")
        )
        self.began = time.perf_counter()

    def run(self, curves: Sequence[str], tune: Sequence[str]) -> Probed:
        ids = hosts_of(self.transport)
        names = {host: f"h{number}" for number, host in enumerate(dict.fromkeys(ids))}
        self.hosts = tuple(names[host] for host in ids)
        if self.size == 1:
            return Probed(Topology(hosts=self.hosts), 0.0, self.backend, time.perf_counter() - self.began)
        guess = self._guess(self._pairs())
        observations = self._together()
        mine = (
            fit(guess, observations) if self.rank == 0 else Fitted(guess, 0.0)
        )  # the others would only take its cores
        fitted = from_mapping(Fitted, self._first(to_mapping(mine)), "what rank 0 measured")
        found: dict[str, Curve] = {}
        own = tuple(self._curve(name) for name in curves if name not in tune)
        for name in tune:
            found |= self._tuned(name, fitted.topology)
        own += tuple(curve for curve in found.values() if not curve.ratio)
        found = {key: curve for key, curve in found.items() if curve.ratio}
        spent = time.perf_counter() - self.began
        whole = Probed(fitted.topology, fitted.residual, self.backend, spent, own, found)
        return self._agreed(whole)

    # ---- pairs

    def _pairs(self) -> dict[tuple[int, int, int], tuple[float, float]]:
        """By (rank, rank, lane): seconds of a small and of a large message one way."""
        pairs = [(a, b) for a in range(self.size) for b in range(a + 1, self.size)]
        if self.size > ALL_PAIRS:
            seen: dict[frozenset[str], tuple[int, int]] = {}
            for a, b in pairs:
                seen.setdefault(frozenset((self.hosts[a], self.hosts[b])), (a, b))
            pairs = list(seen.values())
        each = self.seconds / 3 / len(pairs) / self.transport.lanes
        mine = []
        for a, b in pairs:
            for lane in range(self.transport.lanes):
                if self.rank in (a, b):
                    mine.append((a, b, lane, *(self._ping_pong(a, b, lane, size, each / 2) for size in (SMALL, LARGE))))
                self._wait_for_all()
        merged: dict[tuple[int, int, int], tuple[float, float]] = {}
        for part in self._gathered(mine):
            for a, b, lane, small, large in part:
                before = merged.get((a, b, lane), (small, large))
                merged[a, b, lane] = (max(before[0], small), max(before[1], large))
        return merged

    def _ping_pong(self, a: int, b: int, lane: int, size: int, seconds: float) -> float:
        """Seconds of one way: half of a round trip, the median of several."""
        peer = b if self.rank == a else a
        data = torch.zeros(size, dtype=torch.uint8, device=self.device)
        message = [Message(peer, data, lane)]

        def there_and_back() -> float:
            begin = time.perf_counter()
            for sending in (self.rank == a, self.rank != a):
                self.transport.post(message if sending else [], [] if sending else message).wait()
                if self.device.type != "cpu":
                    torch.cuda.synchronize()
            return time.perf_counter() - begin

        there_and_back()
        trip = there_and_back()
        count = torch.tensor([max(3, min(30, int(seconds / max(trip, 1e-6))))], device=self.device)
        told = [Message(peer, count.view(torch.uint8), lane)]
        self.transport.post(told if self.rank == a else [], told if self.rank == b else []).wait()
        return undisturbed([there_and_back() for _ in range(int(count))]) / 2

    def _guess(self, pairs: Mapping[tuple[int, int, int], tuple[float, float]]) -> Topology:
        """A topology of the right shape: all pairs of the same two hosts are alike, whatever their ranks."""
        alike: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
        for (a, b, lane), times in pairs.items():
            for ends in {(self.hosts[a], self.hosts[b]), (self.hosts[b], self.hosts[a])}:
                alike.setdefault((*ends, lane), []).append(times)
        typical = {key: tuple(median(each) for each in zip(*times, strict=True)) for key, times in alike.items()}
        links: list[Link] = []
        shared: dict[str, float] = {}
        message_s = min(small for small, _ in typical.values()) / 4
        for a in range(self.size):
            for b in range(self.size):
                for lane in range(self.transport.lanes) if a != b else ():
                    small, large = typical[self.hosts[a], self.hosts[b], lane]
                    links.append(self._link(a, b, lane, small, large, message_s, shared))
        adding, copying = self._local()
        return Topology(
            hosts=self.hosts,
            links=tuple(links),
            capacities=tuple(Capacity(name=name, bytes_per_s=rate) for name, rate in shared.items()),
            message_s=message_s,
            reduce_s_per_byte=adding,
            copy_s_per_byte=copying,
            cores=self._cores(),
        )

    def _link(
        self, a: int, b: int, lane: int, small: float, large: float, message_s: float, shared: dict[str, float]
    ) -> Link:
        rate = LARGE / max(large - small, 1e-9)
        here, there = self.hosts[a], self.hosts[b]
        if here == there:
            rates = {f"{here}:processors": 2 * rate} if self.device.type == "cpu" else {}
        else:
            rates = {f"{here}:network{lane}:out": rate, f"{there}:network{lane}:in": rate}
        for name, most in rates.items():
            shared[name] = max(shared.get(name, 0.0), most)
        kind = MEMORY if here == there else NETWORK
        latency_s = max(small - 2 * message_s, 1e-7)
        return Link(
            source=a, target=b, lane=lane, kind=kind, bytes_per_s=rate, latency_s=latency_s, through=tuple(rates)
        )

    def _local(self) -> tuple[float, float]:
        """Seconds to add and to copy one byte, on all ranks at once; per core, where they share cores."""
        a, b = (torch.ones(LARGE // ITEMSIZE, device=self.device) for _ in range(2))
        self._wait_for_all()
        mine = []
        for act in (partial(torch.add, a, b, out=a), partial(a.copy_, b)):
            times = []
            for _ in range(7):
                begin = time.perf_counter()
                act()
                if self.device.type != "cpu":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - begin) / LARGE)
            mine.append(median(times))
        adding, copying = (median(each) for each in zip(*self._gathered(mine), strict=True))
        return adding, copying

    def _cores(self) -> dict[str, int]:
        if self.device.type != "cpu":
            return {}
        return dict(zip(self.hosts, self._gathered(usable_cores()), strict=True))

    # ---- all at once

    def _together(self) -> list[Observation]:
        programs = [build(collective, name, self.size) for collective, name in TOGETHER]
        end = time.perf_counter() + self.seconds
        observed = []
        for size in SIZES:
            for program in programs:
                if self._first(time.perf_counter() > end) and size > SIZES[0]:
                    continue
                each = self.seconds / len(SIZES) / len(programs)
                observed.append(Observation(program, size, ITEMSIZE, *self._turns([self._runner(program, size)], each)))
        return observed

    def _runner(self, program: Program, nbytes: int, *, own: bool = False) -> Callable[[], None]:
        """What carries out the program on tensors of this rank; ``own``: the backend's collective on the same ones."""
        sizes = block_sizes(program.collective, self.size, nbytes // ITEMSIZE)
        spans = program.spans(sizes, ALIGNMENT)

        def tensor(chunks: Sequence[int]) -> torch.Tensor | None:
            count = sum(spans[chunk].stop - spans[chunk].start for chunk in chunks)
            return torch.ones(count, device=self.device) if len(chunks) else None

        operand, result = tensor(program.starts[self.rank]), tensor(program.ends[self.rank])

        def run() -> None:
            if own:
                torch_own.run(program.collective, self.group, operand, result, 0, "sum")
            else:
                drive(carry_out(self.transport, program, operand, result, sizes=sizes))
            if self.device.type != "cpu":
                torch.cuda.synchronize()

        return run

    def _turns(self, arms: Sequence[Callable[[], None]], seconds: float) -> list[float]:
        """What each takes from a common start until the slowest rank is done. They take turns, so that what
        else the machine does meets all of them, every other turn backwards, so that each follows each. Half of the
        time is for all, the other half for those that may yet be the best."""
        times: list[list[float]] = [[] for _ in arms]
        backwards = False

        def turn(among: Sequence[int]) -> None:
            nonlocal backwards
            for number in reversed(among) if backwards else among:
                self._wait_for_all()
                begin = time.perf_counter()
                arms[number]()
                times[number].append(time.perf_counter() - begin)
            backwards = not backwards

        def turns(among: Sequence[int], share: float) -> list[float]:
            begin = time.perf_counter()
            turn(among)
            taken = time.perf_counter() - begin
            for _ in range(self._first(max(FEWEST_TURNS, min(MOST_TURNS, int(share / taken))))):
                turn(among)
            everybody = self._gathered([mine[1:] for mine in times])
            return [usual([max(each) for each in zip(*ranks, strict=True)]) for ranks in zip(*everybody, strict=True)]

        every = list(range(len(arms)))
        turn(every)  # to warm up
        found = turns(every, seconds / 2)
        close = [number for number in every if found[number] <= CLOSE * min(found)]
        return turns(close, seconds / 2) if len(close) > 1 else found

    def _curve(self, collective: str) -> Curve:
        """The backend's own collective."""
        if collective == "send_recv":
            raise UserError("probe: torch.distributed has no send_recv of a group: leave it out of curves.")
        times, program = [], build(collective, "direct", self.size)
        for nbytes in NATIVE_SIZES:
            run = self._runner(program, self._even(nbytes), own=True)
            times += self._turns([run], self.seconds / 10 / len(NATIVE_SIZES))
        return Curve(name=self.backend, collective=collective, sizes=NATIVE_SIZES, values=tuple(times))

    def _even(self, nbytes: int) -> int:
        """As many bytes as torch's own collectives take: of equal blocks."""
        return max(1, nbytes // (ITEMSIZE * self.size)) * ITEMSIZE * self.size

    def _tuned(self, collective: str, topology: Topology) -> dict[str, Curve]:
        """How far the predictions of the algorithms that might be chosen miss, by size; and the backend's own."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for nbytes in TUNED_SIZES:
            size = self._even(nbytes)
            choice = choose(collective, size, topology)
            options = [Option(choice.algorithm, choice.segments, choice.predicted_s), *choice.alternatives]
            near = [o for o in options if o.predicted_s <= FAR * choice.predicted_s and o.algorithm in ALGORITHMS]
            arms: dict[str, Callable[[], None]] = {}
            alike: dict[Any, str] = {}  # by what is done: two names for the same need not both be timed
            stands_for: dict[str, str] = {}
            for option in near:
                made = choose(collective, size, topology, only=(option.algorithm,), segments=option.segments).program
                assert made is not None
                name = alike.setdefault((made.rounds, made.shares, made.chunks), option.algorithm)
                stands_for[option.algorithm] = name
                if name == option.algorithm:
                    arms[name] = self._runner(made, size)
            if collective != "send_recv":
                arms[self.backend] = self._runner(build(collective, "direct", self.size), size, own=True)
            times = dict(zip(arms, self._turns(list(arms.values()), self.seconds / len(TUNED_SIZES)), strict=True))
            values = {o.algorithm: times[stands_for[o.algorithm]] / o.predicted_s for o in near}
            if self.backend in times:
                values[self.backend] = times[self.backend]
            for name, value in values.items():
                sizes, ratios = found.setdefault(name, ([], []))
                sizes.append(nbytes)
                ratios.append(value)
        return {
            f"{collective}/{name}": Curve(
                name=name,
                collective=collective,
                sizes=tuple(sizes),
                values=tuple(ratios),
                ratio=name != self.backend,
            )
            for name, (sizes, ratios) in found.items()
        }

    # ---- all ranks come to the same numbers

    def _wait_for_all(self) -> None:
        dist.barrier(self.group)

    def _gathered(self, mine: Any) -> list[Any]:
        """Everybody's plain values, in order of the ranks; they travel as JSON."""
        text = torch.tensor(list(json.dumps(mine).encode()), dtype=torch.uint8, device=self.device)
        lengths = self._rows(torch.tensor([len(text)], device=self.device))
        room = torch.full((int(lengths.max()),), ord(" "), dtype=torch.uint8, device=self.device)
        room[: len(text)] = text
        return [json.loads(bytes(row.tolist())) for row in self._rows(room)]

    def _rows(self, mine: torch.Tensor) -> torch.Tensor:
        """[k] on each rank -> [ranks, k] on all."""
        rows = mine.new_empty(self.size * len(mine))
        drive(carry_out(self.transport, build("all_gather", "direct", self.size), mine, rows))
        return rows.view(self.size, -1)

    def _first(self, mine: Any) -> Any:
        """Rank 0's value: clocks differ, decisions must not."""
        return self._gathered(mine)[0]

    def _agreed(self, mine: Probed) -> Probed:
        return from_mapping(Probed, self._first(to_mapping(mine)), "what rank 0 measured")
