"""An exact run of a lowered schedule with the strictest messages there are: a send ends only in its receive."""

from collections import deque

from shoal.errors import UserError
from shoal.parallel.schedules.actions import RECEIVES, SENDS, Action, Kind
from shoal.parallel.schedules.lowering import Program


def run_unbuffered(name: str, program: Program) -> None:
    """Take every worker to its end. Raises UserError naming who waits for whom, or the send and the receive that meet
    and do not belong together.

    The order in which workers are looked at does not matter: a meeting of two workers, once possible, stays possible
    until it happens, so one run speaks for all."""
    at = [0] * len(program)
    ready = deque(range(len(program)))
    while ready:
        worker = ready.popleft()
        row = program[worker]
        while at[worker] < len(row):
            action = row[at[worker]]
            peer = action.peer
            if peer >= 0:
                if at[peer] == len(program[peer]) or peer == worker:
                    break
                other = program[peer][at[peer]]
                if other.peer != worker or (action.kind in SENDS) == (other.kind in SENDS):
                    break
                if not _belong_together(action, other):
                    raise UserError(
                        f"schedule {name!r}: worker {worker} at {action} meets worker {peer} at {other}: "
                        f"put the receives of each pair of workers in the order of the sends."
                    )
                at[peer] += 1
                ready.append(peer)
            at[worker] += 1
    if any(place < len(row) for place, row in zip(at, program, strict=True)):
        raise UserError(_who_waits(name, program, at))


def _belong_together(one: Action, other: Action) -> bool:
    send, receive = (one, other) if one.kind in SENDS else (other, one)
    if send.micro_batch != receive.micro_batch:
        return False
    if send.kind is Kind.SEND_ACTIVATION:
        return receive.kind is Kind.RECEIVE_ACTIVATION and receive.chunk == send.chunk + 1
    return receive.kind is Kind.RECEIVE_GRADIENT and receive.chunk == send.chunk - 1


def _who_waits(name: str, program: Program, at: list[int]) -> str:
    worker = next(w for w, place in enumerate(at) if place < len(program[w]))
    steps: dict[int, str] = {}
    while worker not in steps and at[worker] < len(program[worker]):
        action = program[worker][at[worker]]
        wanted = "a send" if action.kind in RECEIVES else "a receive"
        steps[worker] = f"worker {worker} at {action} waits for {wanted} of worker {action.peer}"
        worker = action.peer
    if worker not in steps:
        return f"schedule {name!r} hangs: {'; '.join(steps.values())}, which is at its end: add the missing action."
    circle = list(steps)[list(steps).index(worker) :]
    return (
        f"schedule {name!r} deadlocks with unbuffered sends: {'; '.join(steps[each] for each in circle)}: "
        f"let one of them receive before it sends."
    )
