"""What must be done before what: the one rule that simulation, lowering and verification share."""

from collections import deque

from shoal.errors import UserError
from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.schedule import Schedule

Place = tuple[int, int]  # (worker, index into its actions)
Needed = tuple[bool, int, int]  # (of a forward pass, chunk, micro-batch)
Visit = tuple[int, int, Place | None]  # (worker, index into its actions, where the pass stands that gives its input)


def needs(action: Action, chunks: int) -> Needed | None:
    """The pass whose result an action takes from the chunk before it in the flow; None at the model's two ends.

    What an action needs of its own chunk (I its F, W its I) its worker's own order gives."""
    kind, chunk, micro_batch, _ = action
    if kind is Kind.FORWARD:
        return (True, chunk - 1, micro_batch) if chunk else None
    if kind is Kind.BACKWARD_WEIGHT or chunk == chunks - 1:
        return None
    return (False, chunk + 1, micro_batch)


def gives(action: Action) -> Needed | None:
    """What others may need once an action is done."""
    if action.kind is Kind.BACKWARD_WEIGHT:
        return None
    return (action.kind is Kind.FORWARD, action.chunk, action.micro_batch)


def walk(schedule: Schedule) -> list[Visit]:
    """All actions in an order in which they can be done one after the other: each one's giver comes before it.

    Raises UserError, naming who waits for whom, when the order of the workers' actions lets nobody go on."""
    visits: list[Visit] = []
    done: dict[Needed, Place] = {}
    waiting: dict[Needed, int] = {}  # what a worker stands still for
    at = [0] * schedule.workers
    ready = deque(range(schedule.workers))
    chunks = schedule.chunks
    while ready:
        worker = ready.popleft()
        row = schedule.actions[worker]
        for index in range(at[worker], len(row)):
            action = row[index]
            need = needs(action, chunks)
            giver = done.get(need) if need else None
            if need and giver is None:
                waiting[need] = worker
                at[worker] = index
                break
            visits.append((worker, index, giver))
            given = gives(action)
            if given:
                done[given] = worker, index
                if given in waiting:
                    ready.append(waiting.pop(given))
        else:
            at[worker] = len(row)
    if waiting:
        raise UserError(_deadlock(schedule, at))
    return visits


def _deadlock(schedule: Schedule, at: list[int]) -> str:
    """Follow who waits for whom until a worker comes up twice, or one that has nothing left to do."""
    worker = next(w for w, place in enumerate(at) if place < len(schedule.actions[w]))
    seen: list[int] = []
    steps = []
    while worker not in seen and at[worker] < len(schedule.actions[worker]):
        seen.append(worker)
        action = schedule.actions[worker][at[worker]]
        need = needs(action, schedule.chunks)
        assert need is not None, "an action that needs nothing is never stuck"
        other = schedule.worker_of(need[1])
        text = f"{'forward' if need[0] else 'backward'} of chunk {need[1]}, micro-batch {need[2]}"
        steps.append((worker, f"worker {worker} at {action} waits for worker {other} ({text})"))
        worker = other
    if worker in seen:
        circle = [text for each, text in steps if each in seen[seen.index(worker) :]]
        repair = "move one of these actions behind what the other waits for."
    else:
        circle = [text for _, text in steps] + [f"worker {worker} has nothing left to do"]
        repair = "add the missing action."
    return f"schedule {schedule.name!r} deadlocks: {'; '.join(circle)}: {repair}"
