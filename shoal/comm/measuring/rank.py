"""What every rank does: for each cell, the arms take turns, and the seconds that each takes are written down."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.cluster.detect import usable_cores
from shoal.comm.group import Group
from shoal.comm.measuring.cases import Arm, Cell, Settings, cells
from shoal.comm.measuring.figures import Measured, Taken, iterations
from shoal.comm.measuring.gate import Gate, gate
from shoal.comm.measuring.groups import Groups, opened
from shoal.comm.measuring.operations import Tensors, tensors
from shoal.comm.status import Phase

WARM_UP = 3  # calls of each arm before its first measured one


@dataclass(frozen=True)
class _Runner:
    """An arm made ready: ``call`` is what is timed."""

    arm: Arm | None  # None: memcpy
    call: Callable[[], object]
    tensors: Tensors | None


def measure(group: Group, settings: Settings) -> list[Measured]:
    """All rounds of all cells, as this rank saw them. Rank 0 emits how far it is: {"cell": text, "done": share}."""
    gc.disable()
    every = cells(settings)
    budget_s = settings.seconds / max(1, len(every) * settings.rounds)
    out: list[Measured] = []
    with opened(group, settings) as groups:
        ready = gate(group, usable_cores())
        for turn in range(settings.rounds):
            for number, cell in enumerate(every):
                group.report(Phase.exchanging, step=turn * len(every) + number + 1)
                if group.rank == 0:
                    done = (turn * len(every) + number) / (len(every) * settings.rounds)
                    group.emit({"event": "measuring", "cell": str(cell), "round": turn + 1, "done": done})
                measured = _Bench(group, groups, ready, number, cell).measure(budget_s, settings)
                out.append(measured)
                gc.collect()
    return out


class _Bench:
    def __init__(self, group: Group, groups: Groups, ready: Gate, number: int, cell: Cell) -> None:
        self._group, self._ready, self._number, self._cell = group, ready, number, cell
        self._groups = groups

    def measure(self, budget_s: float, settings: Settings) -> Measured:
        with self._runners() as runners:
            wrong = [line for runner in runners for line in self._checked(runner, "before")]
            for runner in runners:
                if runner.tensors:
                    runner.tensors.rest()
            times = [self._timed(runner)[0] for runner in runners for _ in range(WARM_UP)][WARM_UP - 1 :: WARM_UP]
            calibrated = self._largest(times)
            count = iterations(calibrated, budget_s, settings.least, settings.most)
            taken = [Taken() for _ in runners]
            for turn in range(count):
                for shift in range(len(runners)):
                    index = (turn + shift) % len(runners)
                    wall, cpu = self._timed(runners[index])
                    taken[index].wall_s.append(wall)
                    taken[index].cpu_s.append(cpu)
            for used in {id(runner.tensors): runner.tensors for runner in runners if runner.tensors}.values():
                if not used.rested():
                    who = " or ".join(str(runner.arm) for runner in runners if runner.tensors is used)
                    wrong.append(f"{self._where(who)}: a sum of zeros is not zero")
            wrong += [line for runner in runners for line in self._checked(runner, "after")]
        return Measured(self._number, taken, list(dict.fromkeys(wrong)))

    def _timed(self, runner: _Runner) -> tuple[float, float]:
        self._ready()
        cpu = time.process_time_ns()
        begun = time.perf_counter_ns()
        runner.call()
        ended = time.perf_counter_ns()
        return (ended - begun) / 1e9, (time.process_time_ns() - cpu) / 1e9

    def _largest(self, times: Sequence[float]) -> list[float]:
        rows = [
            list(map(float, row.decode().split())) for row in self._group.gather(" ".join(map(str, times)).encode())
        ]
        return [max(column) for column in zip(*rows, strict=True)]

    def _checked(self, runner: _Runner, when: str) -> list[str]:
        if runner.tensors is None:
            return []
        runner.tensors.fill()
        self._ready()
        runner.call()
        return [] if runner.tensors.right() else [f"{self._where(runner.arm)}: wrong result {when} the repetitions"]

    def _where(self, who: object) -> str:
        return f"{who}, {self._cell}, rank {self._group.rank}"

    @contextmanager
    def _runners(self) -> Iterator[list[_Runner]]:
        """The arms of the cell and, last, memcpy. Arms share their tensors, but for those on a heap."""
        cell, group = self._cell, self._group
        dtype = getattr(torch, cell.dtype)
        device = self._groups.device

        def empty(elements: int) -> Tensor:
            return torch.zeros(elements, dtype=dtype, device=device)

        shared = tensors(cell.op, cell.elements, group.rank, group.world, empty)
        runners = []
        for arm in cell.arms:
            own = shared
            if arm.zero_copy:
                on_heap = self._groups.on_heap(arm.transport, dtype)
                own = tensors(cell.op, cell.elements, group.rank, group.world, on_heap)
            runners.append(_Runner(arm, self._groups.call(cell.op, arm, own), own))
        source, target = empty(cell.elements), empty(cell.elements)
        runners.append(_Runner(None, self._groups.finished(lambda: target.copy_(source)), None))
        yield runners
