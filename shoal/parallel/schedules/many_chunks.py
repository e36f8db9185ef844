"""Looped orders: each worker holds several chunks, and a micro-batch goes round all workers several times."""

from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.schedule import Schedule, looped


def interleaved(workers: int, micro_batches: int, chunks: int) -> Schedule:
    """1F1B over ``chunks`` chunks a worker: a smaller bubble, more sends (Narayanan et al., 2021).

    Micro-batches go round in groups that cover all workers. The paper wants groups of exactly ``workers``; here a
    number that does not divide makes the first groups larger, which keeps the bubble. The largest group comes first,
    because the passes ahead must suffice for it."""
    groups = _groups(workers, micro_batches)
    total = micro_batches * chunks
    rows = []
    for worker in range(workers):
        forward = [(chunk, m) for group in groups for chunk in range(chunks) for m in group]
        backward = [(chunk, m) for group in groups for chunk in reversed(range(chunks)) for m in group]
        ahead = min(2 * (workers - worker - 1) + (chunks - 1) * len(groups[0]), total)
        row = [_action(Kind.FORWARD, worker, workers, step) for step in forward[:ahead]]
        for place, step in enumerate(backward):
            if ahead + place < total:
                row.append(_action(Kind.FORWARD, worker, workers, forward[ahead + place]))
            row.append(_action(Kind.BACKWARD, worker, workers, step))
        rows.append(tuple(row))
    return Schedule("interleaved", looped(workers, chunks), micro_batches, tuple(rows))


def breadth_first(workers: int, micro_batches: int, chunks: int) -> Schedule:
    """Every chunk runs all micro-batches before the next one starts (Lamy-Poirier, 2023)."""
    every = range(micro_batches)
    rows = []
    for worker in range(workers):
        forward = [(chunk, m) for chunk in range(chunks) for m in every]
        backward = [(chunk, m) for chunk in reversed(range(chunks)) for m in every]
        row = [_action(Kind.FORWARD, worker, workers, step) for step in forward]
        rows.append((*row, *(_action(Kind.BACKWARD, worker, workers, step) for step in backward)))
    return Schedule("breadth-first", looped(workers, chunks), micro_batches, tuple(rows))


def _groups(workers: int, micro_batches: int) -> list[range]:
    """Consecutive runs of at least ``workers`` micro-batches (or all, if there are fewer), the larger ones first."""
    count = max(1, micro_batches // workers)
    sizes = [micro_batches // count + (group < micro_batches % count) for group in range(count)]
    starts = [sum(sizes[:group]) for group in range(count)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _action(kind: Kind, worker: int, workers: int, step: tuple[int, int]) -> Action:
    """``step``: which of the worker's own chunks, and the micro-batch."""
    turn, micro_batch = step
    return Action(kind, turn * workers + worker, micro_batch)
