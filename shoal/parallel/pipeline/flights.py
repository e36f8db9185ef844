"""How many micro-batches a worker keeps activations of: counted, to be held against what the schedule predicts."""

from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.activations import Peak


class Flights:
    """(chunk, micro-batch) pairs of one worker, as its actions are done."""

    def __init__(self) -> None:
        self._full = self._kept = 0
        self.peak = Peak(0, 0, 0)

    def did(self, action: Action) -> None:
        if action.kind is Kind.FORWARD:
            self._full += 1
        elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            self._full -= 1
            self._kept += action.kind is Kind.BACKWARD_INPUT
        elif action.kind is Kind.BACKWARD_WEIGHT:
            self._kept -= 1
        most = self.peak
        self.peak = Peak(
            max(most.full, self._full), max(most.kept, self._kept), max(most.together, self._full + self._kept)
        )
