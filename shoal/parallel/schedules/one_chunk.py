"""Orders for one chunk a worker: off, GPipe, 1F1B and the zero-bubble orders H1 and H2."""

from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.schedule import Schedule, looped


def off(workers: int, micro_batches: int) -> Schedule:
    """A plain split into layers: one micro-batch goes there and back before the next one starts."""
    return _schedule("off", workers, micro_batches, [_one_by_one(w, micro_batches) for w in range(workers)])


def gpipe(workers: int, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al., 2019)."""
    every = range(micro_batches)
    rows = [[*(Action(F, w, m) for m in every), *(Action(B, w, m) for m in every)] for w in range(workers)]
    return _schedule("gpipe", workers, micro_batches, rows)


def one_forward_one_backward(workers: int, micro_batches: int) -> Schedule:
    """As few forward passes ahead as keep all workers busy (Narayanan et al., 2019; with a flush: 2021)."""
    rows = []
    for worker in range(workers):
        row = []
        ahead = min(workers - worker - 1, micro_batches)
        row += [Action(F, worker, m) for m in range(ahead)]
        for m in range(micro_batches):
            if ahead + m < micro_batches:
                row.append(Action(F, worker, ahead + m))
            row.append(Action(B, worker, m))
        rows.append(row)
    return _schedule("1f1b", workers, micro_batches, rows)


def zero_bubble_h1(workers: int, micro_batches: int) -> Schedule:
    """1F1B whose weight gradients come late enough to fill the gaps, in 1F1B's memory (Qi et al., 2024)."""
    return _zero_bubble("zb-h1", workers, micro_batches, [(p_s, w) for w, p_s in _to_last(workers)])


def zero_bubble_h2(workers: int, micro_batches: int) -> Schedule:
    """Twice the forward passes ahead of H1: no worker stands still between its first pass and its last one."""
    return _zero_bubble("zb-h2", workers, micro_batches, [(2 * p_s - 1, 2 * w) for w, p_s in _to_last(workers)])


F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def _to_last(workers: int) -> list[tuple[int, int]]:
    """(worker, stages from it to the last one, itself among them)."""
    return [(worker, workers - worker) for worker in range(workers)]


def _zero_bubble(name: str, workers: int, micro_batches: int, shape: list[tuple[int, int]]) -> Schedule:
    """``shape``: by worker, forward passes before the first backward one, and how many passes W comes after I."""
    rows = []
    for worker, (first, late) in enumerate(shape):
        row = [Action(F, worker, m) for m in range(min(first, micro_batches))]
        for m in range(micro_batches):
            row.append(Action(I, worker, m))
            if m >= late:
                row.append(Action(W, worker, m - late))
            if first + m < micro_batches:
                row.append(Action(F, worker, first + m))
        row += [Action(W, worker, m) for m in range(max(0, micro_batches - late), micro_batches)]
        rows.append(row)
    return _schedule(name, workers, micro_batches, rows)


def _one_by_one(worker: int, micro_batches: int) -> list[Action]:
    return [Action(kind, worker, m) for m in range(micro_batches) for kind in (F, B)]


def _schedule(name: str, workers: int, micro_batches: int, rows: list[list[Action]]) -> Schedule:
    return Schedule(name, looped(workers, 1), micro_batches, tuple(map(tuple, rows)))
