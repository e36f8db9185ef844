"""How many activations a worker keeps at a time: its own order decides that, however long the passes take."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.parallel.schedules.actions import Kind
from shoal.parallel.schedules.schedule import Schedule


@dataclass(frozen=True)
class Peak:
    """The most of one worker, in (chunk, micro-batch) pairs, or in the unit of the sizes given."""

    full: float  # from F to I or B
    kept: float  # from I to W: what a weight gradient still needs
    together: float  # of both at one time: not their sum, as they peak at different times


def peak_activations(
    schedule: Schedule, full: Sequence[float] | None = None, kept: Sequence[float] | None = None
) -> tuple[Peak, ...]:
    """By worker. ``full`` and ``kept`` are the sizes of one micro-batch in each chunk; None counts each as 1."""
    full = full or (1,) * schedule.chunks
    kept = kept or full
    return tuple(_peak(schedule, worker, full, kept) for worker in range(schedule.workers))


def _peak(schedule: Schedule, worker: int, full: Sequence[float], kept: Sequence[float]) -> Peak:
    now_full = now_kept = most_full = most_kept = most = 0.0
    for kind, chunk, _, _ in schedule.actions[worker]:
        if kind is Kind.FORWARD:
            now_full += full[chunk]
        elif kind is Kind.BACKWARD_WEIGHT:
            now_kept -= kept[chunk]
        else:
            now_full -= full[chunk]
            if kind is Kind.BACKWARD_INPUT:
                now_kept += kept[chunk]
        most_full, most_kept = max(most_full, now_full), max(most_kept, now_kept)
        most = max(most, now_full + now_kept)
    return Peak(most_full, most_kept, most)
