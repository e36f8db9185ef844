"""Orders over a V: worker w holds chunks w and 2p - 1 - w, so the loss is made where the input came in."""

from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.schedule import Schedule, v_shaped

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def zero_bubble_v(workers: int, micro_batches: int) -> Schedule:
    """No gaps, in 1F1B's memory, when F, I and W take equally long (Qi et al., 2024, section 6)."""
    enough = max(micro_batches, 2 * workers - 1)
    rows = []
    for worker in range(workers):
        row = _Row(worker, 2 * workers - 1 - worker)
        rest = workers - worker
        row.repeat(2 * rest - 1, "F0")
        row.repeat(worker, "F1", "F0")
        row.repeat(rest, "F1", "I1", "W1")
        row.repeat(enough - 2 * rest + 1 - worker, "F0", "I0", "W0", "F1", "I1", "W1")
        row.repeat(row.count["F0"] - row.count["F1"], "I0", "W0", "F1", "I1", "W1")
        row.repeat(worker, "I0", "I1")
        row.repeat(rest, "I0", "W0")
        row.repeat(enough - row.count["W1"], "W1")
        row.repeat(enough - row.count["W0"], "W0")
        rows.append(row.of_first(micro_batches))
    return Schedule("zb-v", v_shaped(workers), micro_batches, tuple(rows))


def dual_pipe_v(workers: int, micro_batches: int) -> Schedule:
    """DualPipe folded to a V (DeepSeek, 2025): forward passes of one micro-batch stand beside backward ones of another.

    On devices that run both at once, each such pair is one step; here they follow each other."""
    enough = max(micro_batches, 2 * workers)
    rows = []
    for worker in range(workers):
        row = _Row(worker, 2 * workers - 1 - worker)
        rest = workers - worker - 1
        row.repeat(2 * rest, "F0")
        row.repeat(worker + 1, "F0", "F1")
        row.repeat(rest, "I1", "W1", "F1")
        row.repeat(enough - 2 * workers + worker + 1, "F0", "B1", "F1", "B0")
        row.repeat(rest, "B1", "F1", "B0")
        whole = worker + 1  # of the passes that follow, how many make both gradients at once
        for place in range(2 * (worker + 1)):
            row.repeat(1, ("B" if place < whole else "I") + ("0" if place % 2 else "1"))
        row.drain(rest)
        rows.append(row.of_first(micro_batches))
    return Schedule("dualpipe-v", v_shaped(workers), micro_batches, tuple(rows))


class _Row:
    """One worker's actions as they are written down. "F1" is the next forward pass of the worker's second chunk."""

    def __init__(self, first: int, second: int) -> None:
        self._chunks = {"0": first, "1": second}
        self._actions: list[Action] = []
        self._owed: list[str] = []  # chunks with I but without W, oldest first
        self.count = {kind + chunk: 0 for kind in "FIW" for chunk in "01"}

    def repeat(self, times: int, *cells: str) -> None:
        for _ in range(times):
            for cell in cells:
                self._write(cell)

    def drain(self, pairs: int) -> None:
        """The oldest weight gradient owed, then "I0", ``pairs`` times; then all that are still owed."""
        for _ in range(pairs):
            self._write(f"W{self._owed[0]}")
            self._write("I0")
        while self._owed:
            self._write(f"W{self._owed[0]}")

    def of_first(self, micro_batches: int) -> tuple[Action, ...]:
        """Without the micro-batches that only filled the pipeline: what is left still runs, with gaps."""
        return tuple(action for action in self._actions if action.micro_batch < micro_batches)

    def _write(self, cell: str) -> None:
        kind, chunk = cell[0], cell[1]
        counted = ("I" if kind == "B" else kind) + chunk
        self._actions.append(Action(Kind(kind), self._chunks[chunk], self.count[counted]))
        self.count[counted] += 1
        if kind == "B":
            self.count["W" + chunk] += 1
        elif kind == "I":
            self._owed.append(chunk)
        elif kind == "W":
            self._owed.remove(chunk)
