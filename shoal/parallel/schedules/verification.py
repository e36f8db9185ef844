"""What is checked before a schedule is launched. Every complaint is one line: worker, action, repair."""

import gc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shoal.errors import UserError
from shoal.parallel.schedules.actions import COMPUTE, Action, Kind
from shoal.parallel.schedules.activations import Peak, peak_activations
from shoal.parallel.schedules.lowering import Program, lower
from shoal.parallel.schedules.rendezvous import run_unbuffered
from shoal.parallel.schedules.schedule import Schedule

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


@dataclass(frozen=True)
class Verified:
    program: Program  # the lowered form that was checked
    peaks: tuple[Peak, ...]  # by worker


def verify(schedule: Schedule, most_in_flight: float | None = None) -> Verified:
    """Check the order of passes, then the lowered form with sends that only end when their receive has begun.

    ``most_in_flight`` bounds the activations of any worker, those kept for weight gradients among them; None bounds
    nothing. Raises UserError with the first thing wrong."""
    with _uncollected():
        verify_passes(schedule)
        program = lower(schedule)
        verify_program(schedule, program)
        peaks = peak_activations(schedule)
    for worker, peak in enumerate(peaks):
        if most_in_flight is not None and peak.together > most_in_flight:
            raise UserError(
                f"schedule {schedule.name!r}: worker {worker} keeps up to {peak.together:g} activations, and "
                f"{most_in_flight:g} are allowed: move backward passes forward, or allow {peak.together:g}."
            )
    return Verified(program, peaks)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for circles among hundreds of thousands of tuples, which have none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def verify_passes(schedule: Schedule) -> None:
    """Every chunk has one forward pass and its backward pass or passes for each micro-batch, in a legal order: F before
    I before W, and, so that gradients are added in the order of one process, micro-batches ascending in F and in W."""
    where = f"schedule {schedule.name!r}"
    if schedule.micro_batches < 1:
        raise UserError(f"{where}: has no micro-batch: give it at least 1.")
    for chunk, holder in enumerate(schedule.placement):
        if not 0 <= holder < schedule.workers:
            raise UserError(
                f"{where}: chunk {chunk} is on worker {holder}, of {schedule.workers}: place it on one of them."
            )
    for worker, row in enumerate(schedule.actions):
        _verify_row(schedule, worker, row, f"{where}: worker {worker}")


def _verify_row(schedule: Schedule, worker: int, row: tuple[Action, ...], where: str) -> None:
    done: dict[tuple[Kind, int], set[int]] = defaultdict(set)
    last: dict[tuple[bool, int], int] = {}
    for action in row:
        kind, chunk, micro_batch, _ = action
        if kind not in COMPUTE:
            raise UserError(f"{where} has {action} among its passes: leave it out, sends and receives are worked out.")
        if not 0 <= chunk < schedule.chunks or schedule.placement[chunk] != worker:
            raise UserError(
                f"{where} has {action}, and chunk {chunk} is not its own: move it to the worker that holds it."
            )
        if not 0 <= micro_batch < schedule.micro_batches:
            raise UserError(f"{where} has {action}, of {schedule.micro_batches} micro-batches: count them from 0.")
        if micro_batch in done[kind, chunk]:
            raise UserError(f"{where} has {action} twice: take one out.")
        if kind in (B, I) and micro_batch in done[I if kind is B else B, chunk]:
            raise UserError(f"{where} has {action} after another backward pass of its own: keep B, or I and W.")
        before = F if kind in (B, I) else I if kind is W else None
        if before and micro_batch not in done[before, chunk]:
            wanted = Action(before, chunk, micro_batch)
            raise UserError(f"{where} has {action} without {wanted} before it: move it behind {wanted}.")
        if kind is not I:
            order = kind is F, chunk
            if micro_batch < last.get(order, -1):
                raise UserError(
                    f"{where} has {action} behind micro-batch {last[order]} of its chunk: put micro-batches in "
                    f"ascending order, as one process adds them."
                )
            last[order] = micro_batch
        done[kind, chunk].add(micro_batch)
    for chunk in schedule.chunks_of(worker):
        for micro_batch in range(schedule.micro_batches):
            if micro_batch not in done[F, chunk]:
                raise UserError(f"{where} never does {Action(F, chunk, micro_batch)}: add it.")
            if micro_batch not in done[B, chunk] and micro_batch not in done[W, chunk]:
                missing = W if micro_batch in done[I, chunk] else B
                raise UserError(f"{where} never does {Action(missing, chunk, micro_batch)}: add it.")


def verify_program(schedule: Schedule, program: Program) -> None:
    """Check a lowered form on its own: the schedule's passes in its order, every message sent after it is made and
    received before it is used, in one order on both sides, and an end that all workers reach with unbuffered sends."""
    where = f"schedule {schedule.name!r}"
    if len(program) != schedule.workers:
        raise UserError(
            f"{where}: the program has {len(program)} workers, the schedule {schedule.workers}: lower it again."
        )
    for worker, row in enumerate(program):
        passes = tuple(action for action in row if action.kind in COMPUTE)
        if passes != schedule.actions[worker]:
            raise UserError(f"{where}: worker {worker}'s passes are not the schedule's: lower it again.")
        _verify_messages(schedule, worker, row, f"{where}: worker {worker}")
    run_unbuffered(schedule.name, program)


def _verify_messages(schedule: Schedule, worker: int, row: tuple[Action, ...], where: str) -> None:
    """A worker's sends and receives against its own passes: none too many, too few, too early or too late."""
    last = schedule.chunks - 1
    holder = schedule.placement
    arrived: set[tuple[bool, int, int]] = set()  # (forward, chunk, micro-batch) whose input is here
    owed: dict[tuple[bool, int, int], int] = {}  # made and not sent yet -> to whom
    for action in row:
        kind, chunk, micro_batch, peer = action
        if kind is Kind.SEND_ACTIVATION or kind is Kind.SEND_GRADIENT:
            if owed.pop((kind is Kind.SEND_ACTIVATION, chunk, micro_batch), None) != peer:
                raise UserError(f"{where} has {action}, and has made no such message: move it behind its pass.")
        elif kind is Kind.RECEIVE_ACTIVATION or kind is Kind.RECEIVE_GRADIENT:
            forward = kind is Kind.RECEIVE_ACTIVATION
            origin = chunk - 1 if forward else chunk + 1
            if not 0 <= origin <= last or holder[origin] != peer or (forward, chunk, micro_batch) in arrived:
                raise UserError(f"{where} has {action}, and that message does not exist: take it out.")
            arrived.add((forward, chunk, micro_batch))
        elif kind is not W:
            forward = kind is F
            origin, target = (chunk - 1, chunk + 1) if forward else (chunk + 1, chunk - 1)
            if 0 <= origin <= last and holder[origin] != worker and (forward, chunk, micro_batch) not in arrived:
                raise UserError(f"{where} has {action} without its input: put the receive before it.")
            arrived.discard((forward, chunk, micro_batch))
            if 0 <= target <= last and holder[target] != worker:
                owed[forward, chunk, micro_batch] = holder[target]
    if owed:
        (forward, chunk, micro_batch), peer = next(iter(owed.items()))
        send = Action(Kind.SEND_ACTIVATION if forward else Kind.SEND_GRADIENT, chunk, micro_batch, peer)
        raise UserError(f"{where} never does {send}: add it.")
    if arrived:
        forward, chunk, micro_batch = next(iter(arrived))
        used = Action(F if forward else B, chunk, micro_batch)
        raise UserError(f"{where} receives the input of {used} and never uses it: move the receive before its pass.")
