"""From the seconds that ranks measured to figures: medians, bandwidths, shares. Plain arithmetic.

Bandwidths are defined as nccl-tests defines them: the algorithm's is S/t for the full buffer S; the bus's is that times
a factor, so that it can be compared with what one link carries, whatever the operation and the number of ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from shoal.comm.measuring.cases import Arm, Cell

MEMCPY = "memcpy"  # the control of every cell: all ranks copy the same number of bytes at once


def bus_factor(op: str, ranks: int) -> float:
    """Bus bandwidth / algorithm bandwidth: what each rank must send over its link, in full buffers."""
    if op == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if op in ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"):
        return (ranks - 1) / ranks
    return 1.0  # broadcast, reduce, send_recv


@dataclass
class Taken:
    """What one rank took for one arm in one round: seconds and CPU seconds of each iteration."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


@dataclass
class Measured:
    """What one rank measured of one cell in one round, by the number of the arm; the last one is memcpy."""

    cell: int
    taken: list[Taken]
    wrong: list[str] = field(default_factory=list)  # a line for each arm whose result was not right


@dataclass(frozen=True)
class Row:
    """The figures of one arm in one cell."""

    op: str
    dtype: str
    bytes: int
    transport: str
    algorithm: str
    zero_copy: bool
    ranks: int
    iterations: int  # in all rounds
    latency_s: float  # of the slowest rank: median of iterations, then of rounds
    min_s: float  # the best iteration of all
    rounds_s: tuple[float, ...]  # the median of each round
    algorithm_bytes_per_s: float | None  # None: a barrier moves nothing
    bus_bytes_per_s: float | None
    memcpy_share: float | None  # of the speed of a copy of the same bytes on all ranks at once, in the same run
    memcpy_share_best: float | None  # the same of the best iterations
    cpu_s: float  # of all ranks, an operation
    against: float | None  # times as fast as its control: the first transport by the same algorithm, else its first arm
    against_best: float | None  # the same of the best iterations
    against_cpu: float | None  # its CPU seconds over this one's


def slowest(ranks: Sequence[Sequence[float]]) -> list[float]:
    """For each iteration, the seconds of the rank that took longest."""
    return [max(times) for times in zip(*ranks, strict=True)]


def rows(cells: Sequence[Cell], ranks: Sequence[Sequence[Measured]]) -> list[Row]:
    """``ranks[r]``: what rank r measured, in the order in which it did."""
    out: list[Row] = []
    for number, cell in enumerate(cells):
        rounds = [[m for m in rank if m.cell == number] for rank in ranks]
        turns = [list(turn) for turn in zip(*rounds, strict=True)]  # [round][rank]
        if not turns:
            continue
        every = [_Arm(turns, index) for index in range(len(cell.arms) + 1)]
        copying = every.pop()
        for arm, found in zip(cell.arms, every, strict=True):
            control = every[cell.arms.index(_control(cell.arms, arm))]
            out.append(_row(cell, arm, found, control, copying, len(ranks)))
    return out


class _Arm:
    def __init__(self, turns: Sequence[Sequence[Measured]], index: int) -> None:
        walls = [slowest([rank.taken[index].wall_s for rank in turn]) for turn in turns]
        self.rounds = tuple(median(times) for times in walls)
        self.best = min(min(times) for times in walls)
        self.iterations = sum(map(len, walls))
        self.median = median(self.rounds)
        # The median here too: to a process that is interrupted, the kernel may charge what it did not use.
        together = [zip(*(rank.taken[index].cpu_s for rank in turn), strict=True) for turn in turns]
        self.cpu = median(median(map(sum, each)) for each in together)


def _control(arms: Sequence[Arm], arm: Arm) -> Arm:
    """The arm that this one is held against: the first transport's by the same algorithm, else its first one."""
    first = [other for other in arms if other.transport == arms[0].transport and not other.zero_copy]
    same = (other for other in first if other.algorithm == arm.algorithm and other.transport != arm.transport)
    return next(same, first[0])


def _row(cell: Cell, arm: Arm, found: _Arm, control: _Arm, copying: _Arm, ranks: int) -> Row:
    rate = cell.nbytes / found.median if cell.nbytes else None
    itself = found is control
    shares = [copy / own for copy, own in zip(copying.rounds, found.rounds, strict=True)]
    return Row(
        op=cell.op,
        dtype=cell.dtype,
        bytes=cell.nbytes,
        transport=arm.transport,
        algorithm=arm.algorithm,
        zero_copy=arm.zero_copy,
        ranks=ranks,
        iterations=found.iterations,
        latency_s=found.median,
        min_s=found.best,
        rounds_s=found.rounds,
        algorithm_bytes_per_s=rate,
        bus_bytes_per_s=None if rate is None else rate * bus_factor(cell.op, ranks),
        memcpy_share=median(shares) if cell.nbytes else None,
        memcpy_share_best=copying.best / found.best if cell.nbytes else None,
        cpu_s=found.cpu,
        against=None if itself else median(a / b for a, b in zip(control.rounds, found.rounds, strict=True)),
        against_best=None if itself else control.best / found.best,
        against_cpu=None if itself or not found.cpu else control.cpu / found.cpu,
    )


def wrong(ranks: Iterable[Sequence[Measured]]) -> list[str]:
    """Every wrong result, once: which arm, which cell, which rank."""
    return list(dict.fromkeys(line for rank in ranks for measured in rank for line in measured.wrong))


def iterations(calibrated_s: Sequence[float], budget_s: float, least: int, most: int) -> int:
    """How many times the arms take turns so that all of them together take about ``budget_s``."""
    return max(least, min(most, int(budget_s / max(sum(calibrated_s), 1e-9))))
