"""Sends and receives, put into a schedule where no order of arrival can hang it."""

from dataclasses import replace

from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.dependencies import Place
from shoal.parallel.schedules.schedule import Schedule
from shoal.parallel.schedules.simulation import Times, simulate

_Message = tuple[float, Place, Place]  # when it is sent, by which pass, for which pass
_LINK = 1 / 32  # time of a message, in passes, by which messages are numbered: any small one; see `lower`
Program = tuple[tuple[Action, ...], ...]  # by worker: computes, sends and receives, in order


def lower(schedule: Schedule) -> Program:
    """Each worker's actions with the sends and receives between them.

    All messages are numbered by when they would be sent if all passes took equally long and messages a little. (If
    they took none, many would be sent at the same time, and a tie broken at will lets messages wait for each other
    that could travel side by side.) A send follows its pass. A worker receives in the order of the numbers and as
    late as it can: up to the message that its next pass needs, and before a send of its own, all with lower numbers.
    So whoever stands still waits for a message with a lower number than the one that it is waited for: nobody waits
    in a circle, even if a send only ends when its receive has begun. And of any two workers, one receives in the
    order in which the other sends, activations and gradients alike: no message needs a tag.

    Chunks that are neighbours on the same worker hand over without a message. Raises UserError for a schedule that
    deadlocks as it is."""
    incoming: list[list[tuple[int, Action]]] = [[] for _ in schedule.actions]  # by worker: number, receive
    sends: dict[Place, tuple[int, Action]] = {}  # behind which pass
    needed: dict[Place, int] = {}  # the message that a pass takes
    for number, (_, giver, taker) in enumerate(_messages(schedule)):
        send, receive = _ends(schedule, giver, taker)
        incoming[taker[0]].append((number, receive))
        sends[giver] = number, send
        needed[taker] = number
    return tuple(_row(row, w, incoming[w], sends, needed) for w, row in enumerate(schedule.actions))


def _messages(schedule: Schedule) -> list[_Message]:
    timeline = simulate(schedule, replace(Times.equal(schedule.chunks), link=_LINK))
    return sorted(
        (timeline.ends[giver[0]][giver[1]], giver, (worker, index))
        for worker, index, giver in timeline.visits
        if giver and giver[0] != worker
    )


def _row(
    passes: tuple[Action, ...],
    worker: int,
    incoming: list[tuple[int, Action]],
    sends: dict[Place, tuple[int, Action]],
    needed: dict[Place, int],
) -> tuple[Action, ...]:
    row: list[Action] = []
    received = 0
    for index, action in enumerate(passes):
        wanted = needed.get((worker, index), -1)
        while received < len(incoming) and incoming[received][0] <= wanted:
            row.append(incoming[received][1])
            received += 1
        row.append(action)
        if sending := sends.get((worker, index)):
            while received < len(incoming) and incoming[received][0] < sending[0]:
                row.append(incoming[received][1])
                received += 1
            row.append(sending[1])
    return tuple(row)


def _ends(schedule: Schedule, giver: Place, taker: Place) -> tuple[Action, Action]:
    made, used = schedule.actions[giver[0]][giver[1]], schedule.actions[taker[0]][taker[1]]
    forward = made.kind is Kind.FORWARD
    return (
        Action(Kind.SEND_ACTIVATION if forward else Kind.SEND_GRADIENT, made.chunk, made.micro_batch, taker[0]),
        Action(Kind.RECEIVE_ACTIVATION if forward else Kind.RECEIVE_GRADIENT, used.chunk, used.micro_batch, giver[0]),
    )
