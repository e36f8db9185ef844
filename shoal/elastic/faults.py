"""Faults that a worker does to itself at a chosen place of a chosen step: what rehearsals and tests are made of."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.comm.status import Phase, StatusBoard
from shoal.errors import UserError, unknown_name

MOST = 100  # of one run: each has a row of the status board, where it is noted when it happened
KINDS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
PHASES = ("loading", "forward", "backward", "exchanging", "waiting", "updating", "evaluating", "saving")


@dataclass(frozen=True)
class Fault:
    """The worker that has ``rank`` when it comes to the phase of a step (from 1) is killed or stopped there.

    Where the step has no such phase, it is the next one that has."""

    kind: Literal["kill", "stop"]
    rank: int
    step: int
    phase: str

    def __str__(self) -> str:
        return f"{self.kind} rank {self.rank} at step {self.step}, {self.phase}"

    @staticmethod
    def parse(text: str) -> "Fault":
        """From "kill:rank=1,step=5,phase=backward". Raises UserError."""
        kind, _, rest = text.partition(":")
        if kind not in KINDS:
            raise unknown_name("kind of fault", kind, KINDS, f"{text!r}")
        values = dict(part.partition("=")[::2] for part in rest.split(",") if part)
        for key in values:
            if key not in ("rank", "step", "phase"):
                raise unknown_name("key", key, ("rank", "step", "phase"), f"{text!r}")
        phase = values.get("phase", "forward")
        if phase not in PHASES:
            raise unknown_name("phase", phase, PHASES, f"{text!r}")
        numbers = [values.get("rank", "0"), values.get("step", "")]
        if not all(number.isdigit() for number in numbers):
            raise UserError(f"fault {text!r}: write it as kill:rank=1,step=5,phase=backward.")
        return Fault("kill" if kind == "kill" else "stop", int(numbers[0]), int(numbers[1]), phase)


class Rehearsal:
    """One worker's part in the faults of a run. What has happened once, to whom ever, does not happen again."""

    def __init__(self, faults: Sequence[Fault], board: StatusBoard) -> None:
        self._faults, self._board = faults, board

    def at(self, rank: int, step: int, phase: Phase) -> None:
        for index, fault in enumerate(self._faults):
            here = fault.rank == rank and fault.step <= step and fault.phase == phase.name
            if here and not self._board.noted(index):
                self._board.note(index, time.monotonic())
                os.kill(os.getpid(), KINDS[fault.kind])
