"""Faults that a worker does to itself at a chosen place of a chosen step: what rehearsals and tests are made of."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.comm.status import Phase, StatusBoard
from shoal.elastic import deeds
from shoal.errors import UserError, unknown_name

if TYPE_CHECKING:
    from shoal.train.worker import Worker

MOST = 100  # of one run: each has a row of the status board, where it is noted when it happened
KINDS = tuple(deeds.DEEDS)
BUCKET = "bucket"  # before a bucket of gradients is handed over; "bucket3": the fourth one
UPDATED, RECOVERING = "updated", "recovering"  # weights are new, the step does not count yet; given a new place
PHASES = (
    *("loading", "forward", "backward", BUCKET, "exchanging", "waiting", "updating", UPDATED),
    *("evaluating", "saving", RECOVERING),
)


@dataclass(frozen=True)
class Fault:
    """What happens to the worker that has ``rank`` when it comes to the phase of a step (from 1).

    Where the step has no such phase, it is the next one that has."""

    kind: str  # of KINDS
    rank: int
    step: int
    phase: str

    def __str__(self) -> str:
        return f"{self.kind} rank {self.rank} at step {self.step}, {self.phase}"

    @staticmethod
    def parse(text: str) -> "Fault":
        """From "kill:rank=1,step=5,phase=backward". Raises UserError."""
        kind, values = parts(text, KINDS, ("rank", "step", "phase"))
        phase = values.get("phase", "forward")
        if not is_phase(phase):
            raise unknown_name("phase", phase, PHASES, f"{text!r}")
        numbers = [values.get("rank", "0"), values.get("step", "")]
        if not all(number.isdecimal() for number in numbers):
            raise UserError(f"fault {text!r}: write it as kill:rank=1,step=5,phase=backward.")
        return Fault(kind, int(numbers[0]), int(numbers[1]), phase)


def parts(text: str, kinds: Sequence[str], keys: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The kind and the values of a fault, written as "kind:key=value,key=value". Raises UserError."""
    kind, _, rest = text.partition(":")
    if kind not in kinds:
        raise unknown_name("kind of fault", kind, kinds, f"{text!r}")
    values = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    for key in values:
        if key not in keys:
            raise unknown_name("key", key, keys, f"{text!r}")
    return kind, values


def is_phase(name: str) -> bool:
    return name in PHASES or (name.startswith(BUCKET) and name.removeprefix(BUCKET).isdecimal())


class Rehearsal:
    """One worker's part in the faults of a run. What has happened once, to whom ever, does not happen again."""

    def __init__(self, faults: Sequence[Fault], board: StatusBoard) -> None:
        self._faults, self._board = faults, board
        self._worker: Worker | None = None
        self._run = Path()
        self._undo: list[tuple[int, deeds.Undo]] = []  # from which step on
        self._followed: object = None

    def follow(self, worker: "Worker", run: Path) -> None:
        """In each epoch: be there when a bucket is handed over, and between the update and its commit."""
        self._worker, self._run = worker, run
        reduction = worker._reduction
        assert reduction is not None
        exchange, optimizer = reduction.first.exchange, worker._optimizer
        post = exchange.post
        bucket = -1

        def posting() -> None:
            nonlocal bucket
            bucket = (bucket + 1) % len(exchange.layout.buckets)
            step = worker.step + 1
            self.at(worker.rank, step, BUCKET)
            self.at(worker.rank, step, f"{BUCKET}{bucket}")
            post()

        exchange.post = posting  # type: ignore[method-assign]
        if optimizer is not None and self._followed is not optimizer:
            self._followed = optimizer
            optimizer.register_step_post_hook(lambda *_: self.at(worker.rank, worker.step + 1, UPDATED))

    def at(self, rank: int, step: int, phase: Phase | str) -> None:
        name = phase.name if isinstance(phase, Phase) else phase
        for over in [each for each in self._undo if each[0] <= step]:
            over[1]()
            self._undo.remove(over)
        for index, fault in enumerate(self._faults):
            here = fault.rank == rank and fault.step <= step and fault.phase == name
            here &= self._worker is not None or fault.kind not in ("flip", "nan")  # it holds nothing yet
            if here and not self._board.noted(index):
                self._board.note(index, time.monotonic())
                undo = deeds.DEEDS[fault.kind].do(self._worker, self._run)
                if undo is not None:
                    self._undo.append((step + deeds.LASTS, undo))


class Noticed:
    """The agent's side of a rehearsal: which faults have happened, each told once."""

    def __init__(self, faults: Sequence[Fault], board: StatusBoard) -> None:
        self._faults, self._board = faults, board
        self._told: set[int] = set()

    def lived_through(self) -> list[tuple[Fault, float]]:
        """Faults that have cost no worker its life, and how many seconds ago they happened."""
        found = self._new(ends=False)
        self._told.update(number for number, _ in found)
        return [(self._faults[number], ago) for number, ago in found]

    def behind(self, event: str) -> dict[str, Any]:
        """What is told with an event beside: the fault that is noticed by it, and how long ago that was."""
        new = self._new(ends=True)
        if event not in ("lost", "suspected") or not new:
            return {}
        number, ago = new[0]
        self._told.add(number)
        return {"fault": str(self._faults[number]), "noticed_s": round(ago, 6)}

    def _new(self, *, ends: bool) -> list[tuple[int, float]]:
        """(number, seconds ago), in the order that they happened. ``ends``: of those that cost a worker its life."""
        untold = [number for number in range(len(self._faults)) if number not in self._told]
        found = sorted((self._board.noted(number), number) for number in untold)
        now = time.monotonic()
        return [(n, now - at) for at, n in found if at and deeds.DEEDS[self._faults[n].kind].ends is ends]
