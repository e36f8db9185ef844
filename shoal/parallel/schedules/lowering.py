"""Sends and receives, put into a schedule where no order of arrival can hang it."""

from collections import defaultdict

from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.dependencies import Place
from shoal.parallel.schedules.schedule import Schedule
from shoal.parallel.schedules.simulation import simulate

Program = tuple[tuple[Action, ...], ...]  # by worker: computes, sends and receives, in order


def lower(schedule: Schedule) -> Program:
    """Each worker's actions with the sends and receives between them.

    All actions are put in one row, by when they start if all passes take equally long. A message is one point of that
    row: its send follows the pass that made it, its receive stands as late as that allows. What every worker does, and
    in which order, is its part of the row. So the first thing in the row that is not done can always be done, even if a
    send only ends when its receive has begun: nothing can deadlock. And of any two workers, one receives in the order
    in which the other sends, activations and gradients alike: no message needs a tag.

    Chunks that are neighbours on the same worker hand over without a message. Raises UserError for a schedule that
    deadlocks as it is."""
    timeline = simulate(schedule)
    places = sorted(
        ((w, i) for w, row in enumerate(schedule.actions) for i in range(len(row))),
        key=lambda place: (timeline.starts[place[0]][place[1]], place),
    )
    rank = {place: number for number, place in enumerate(places)}
    before: dict[Place, list[tuple[float, Place, Place]]] = defaultdict(list)  # what travels right before an action
    for worker, index, giver in timeline.visits:
        if giver and giver[0] != worker:
            taker, following = (worker, index), (giver[0], giver[1] + 1)
            latest = following if rank.get(following, len(places)) < rank[taker] else taker
            before[latest].append((timeline.ends[giver[0]][giver[1]], giver, taker))
    rows: list[list[Action]] = [[] for _ in schedule.actions]
    for place in places:
        for _, giver, taker in sorted(before.get(place, ())):
            _hand_over(rows, schedule, giver, taker)
        rows[place[0]].append(schedule.actions[place[0]][place[1]])
    return tuple(map(tuple, rows))


def _hand_over(rows: list[list[Action]], schedule: Schedule, giver: Place, taker: Place) -> None:
    made, used = schedule.actions[giver[0]][giver[1]], schedule.actions[taker[0]][taker[1]]
    forward = made.kind is Kind.FORWARD
    send = Kind.SEND_ACTIVATION if forward else Kind.SEND_GRADIENT
    receive = Kind.RECEIVE_ACTIVATION if forward else Kind.RECEIVE_GRADIENT
    rows[giver[0]].append(Action(send, made.chunk, made.micro_batch, taker[0]))
    rows[taker[0]].append(Action(receive, used.chunk, used.micro_batch, giver[0]))
