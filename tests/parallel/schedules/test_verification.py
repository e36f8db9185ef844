"""What is wrong with a schedule is found before anything is launched, and named in one line."""

import gc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.parallel.schedules import Action, Kind, Schedule, lower, make_schedule, verify
from shoal.parallel.schedules.csv_file import parse_csv
from shoal.parallel.schedules.registry import MAKERS
from shoal.parallel.schedules.rendezvous import run_unbuffered
from shoal.parallel.schedules.simulation import Times, simulate
from shoal.parallel.schedules.verification import verify_program

SETTINGS = settings(max_examples=150)
schedules = st.builds(
    lambda name, p, m, v: make_schedule(name, p, m, v if MAKERS[name].chunks is None else 1),
    st.sampled_from(sorted(MAKERS)),
    st.integers(2, 5),
    st.integers(1, 6),
    st.integers(1, 3),
)


def with_row(schedule: Schedule, worker: int, row: list[Action]) -> Schedule:
    return replace(schedule, actions=(*schedule.actions[:worker], tuple(row), *schedule.actions[worker + 1 :]))


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert "worker" in text
    return text


@given(schedule=schedules, data=st.data())
@SETTINGS
def test_a_missing_pass_is_named(schedule, data):
    worker = data.draw(st.integers(0, schedule.workers - 1))
    row = list(schedule.actions[worker])
    row.pop(data.draw(st.integers(0, len(row) - 1)))
    assert f"worker {worker}" in refusal(verify, with_row(schedule, worker, row))


@given(schedule=schedules, data=st.data())
@SETTINGS
def test_a_pass_done_twice_is_named(schedule, data):
    worker = data.draw(st.integers(0, schedule.workers - 1))
    row = list(schedule.actions[worker])
    action = data.draw(st.sampled_from(row))
    row.insert(data.draw(st.integers(0, len(row))), action)
    assert f"worker {worker}" in refusal(verify, with_row(schedule, worker, row))


@given(schedule=schedules, data=st.data())
@SETTINGS
def test_a_backward_pass_before_its_forward_or_its_first_half_is_named(schedule, data):
    worker = data.draw(st.integers(0, schedule.workers - 1))
    row = list(schedule.actions[worker])
    later = data.draw(st.sampled_from([a for a in row if a.kind is not Kind.FORWARD]))
    first = Kind.BACKWARD_INPUT if later.kind is Kind.BACKWARD_WEIGHT else Kind.FORWARD
    row.remove(later)
    row.insert(row.index(Action(first, later.chunk, later.micro_batch)), later)
    said = refusal(verify, with_row(schedule, worker, row))
    assert f"{later}" in said
    assert f"worker {worker}" in said


def legal(schedule: Schedule) -> bool:
    """By the definition: no verification, no walk. Tries all that can be done until nothing can."""
    done: set[tuple[str, int, int]] = set()
    rows = [list(row) for row in schedule.actions]
    moved = True
    while moved:
        moved = False
        for row in rows:
            while row:
                kind, chunk, m, _ = row[0]
                before = {("F", chunk - 1, m)} if kind == "F" and chunk else set()
                if kind in "BI":
                    before = {("F", chunk, m)} | ({("g", chunk + 1, m)} if chunk + 1 < schedule.chunks else set())
                if kind == "W":
                    before = {("I", chunk, m)}
                if not before <= done:
                    break
                done |= {(str(kind), chunk, m), *({("g", chunk, m)} if kind in "BI" else ())}
                row.pop(0)
                moved = True
    order = [
        [(a.chunk, a.micro_batch) for a in row if a.kind in kinds] for row in schedule.actions for kinds in ("F", "BW")
    ]
    ascending = all(
        sorted(m for c, m in passes if c == chunk) == [m for c, m in passes if c == chunk]
        for passes in order
        for chunk in range(schedule.chunks)
    )
    return ascending and not any(rows)


@given(schedule=schedules, data=st.data())
@settings(max_examples=300)
def test_two_passes_that_change_places_are_refused_exactly_when_that_is_illegal(schedule, data):
    worker = data.draw(st.integers(0, schedule.workers - 1))
    row = list(schedule.actions[worker])
    one, other = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    row[one], row[other] = row[other], row[one]
    changed = with_row(schedule, worker, row)
    if legal(changed):
        verify(changed)
    else:
        refusal(verify, changed)


@given(schedule=schedules, data=st.data())
@SETTINGS
def test_a_message_that_is_missing_doubled_or_of_another_is_refused(schedule, data):
    program = [list(row) for row in lower(schedule)]
    worker = data.draw(st.sampled_from([w for w, row in enumerate(program) if any(a.peer >= 0 for a in row)]))
    row = program[worker]
    place = data.draw(st.sampled_from([i for i, a in enumerate(row) if a.peer >= 0]))
    fault = data.draw(st.sampled_from(["drop", "double", "other"]))
    if fault == "drop":
        row.pop(place)
    elif fault == "double":
        row.insert(place, row[place])
    else:
        row[place] = row[place]._replace(peer=(row[place].peer + 1) % schedule.workers)
    refusal(verify_program, schedule, tuple(map(tuple, program)))


def swapped(program, worker, kind):
    """The first two messages of one kind on a worker change places."""
    row = list(program[worker])
    first, second = [i for i, a in enumerate(row) if a.kind is kind][:2]
    row[first], row[second] = row[second], row[first]
    return (*program[:worker], tuple(row), *program[worker + 1 :])


def test_receives_in_another_order_than_the_sends_are_named_with_both_ends():
    schedule = make_schedule("gpipe", 2, 3)
    said = refusal(run_unbuffered, "mine", swapped(lower(schedule), 1, Kind.RECEIVE_ACTIVATION))
    assert "worker 0 at SF0.0>1 meets worker 1 at RF1.1<0" in said


def test_two_workers_that_both_send_first_are_caught_although_buffers_would_hide_it():
    """What 1F1B does where each worker sends as soon as it can and receives as late as it can."""
    schedule = make_schedule("1f1b", 2, 2)
    naive = (
        "F0.0 SF0.0>1 F0.1 SF0.1>1 RB0.0<1 B0.0 RB0.1<1 B0.1",
        "RF1.0<0 F1.0 B1.0 SB1.0>0 RF1.1<0 F1.1 B1.1 SB1.1>0",
    )
    program = tuple(tuple(map(action, row.split())) for row in naive)
    said = refusal(verify_program, schedule, program)
    assert "worker 0 at SF0.1>1 waits for a receive of worker 1" in said
    assert "worker 1 at SB1.0>0 waits for a receive of worker 0" in said
    verify_program(schedule, lower(schedule))


def action(text: str) -> Action:
    kind = text.rstrip("0123456789.<>")
    kind = "".join(letter for letter in text.split(".")[0] if letter.isalpha())
    chunk, rest = text[len(kind) :].split(".")
    number, _, peer = rest.replace(">", "<").partition("<")
    return Action(Kind(kind), int(chunk), int(number), int(peer) if peer else -1)


def test_a_csv_that_deadlocks_is_named_with_who_waits_for_whom():
    schedule = parse_csv("F0.0,B0.0,F0.1,B0.1\nF1.0,F1.1,B1.0,B1.1\n", "mine.csv")
    said = refusal(verify, schedule)
    assert "worker 0 at B0.0 waits for worker 1 (backward of chunk 1, micro-batch 0)" in said
    assert "worker 1 at F1.1 waits for worker 0 (forward of chunk 0, micro-batch 1)" in said
    assert "move one of these" in said


def test_more_activations_than_allowed_are_refused_with_both_numbers():
    assert "keeps up to 6 activations, and 4 are allowed" in refusal(verify, make_schedule("gpipe", 2, 6), 4)


def test_micro_batches_out_of_order_are_refused_as_their_gradients_would_be_added_in_another_order():
    said = refusal(verify, parse_csv("F0.0,F0.1,B0.1,B0.0\n", "mine.csv"))
    assert "ascending order" in said


@pytest.mark.parametrize("name", MAKERS)
def test_no_message_waits_for_another_that_it_could_travel_beside(name):
    """With receives that stand still and sends that do not, a program takes as long as if messages came by themselves:
    as many of them lie on the longest path."""
    for p, m in ((2, 6), (3, 2), (4, 8), (5, 16), (8, 32)):
        schedule = make_schedule(name, p, m, 2 if MAKERS[name].chunks is None else 1)
        free = simulate(schedule, replace(Times.equal(schedule.chunks), link=0.01)).span
        assert blocking_span(lower(schedule), link=0.01) == pytest.approx(free), (p, m)


def blocking_span(program, link: float) -> float:
    """Sends never wait; a receive stands still until its message is there."""
    clock, at, there = [0.0] * len(program), [0] * len(program), {}
    moved = True
    while moved:
        moved = False
        for worker, row in enumerate(program):
            while at[worker] < len(row):
                kind, chunk, m, _ = row[at[worker]]
                if kind in ("SF", "SB"):
                    there[kind[1], chunk + (1 if kind == "SF" else -1), m] = clock[worker] + link
                elif kind in ("RF", "RB"):
                    if (kind[1], chunk, m) not in there:
                        break
                    clock[worker] = max(clock[worker], there[kind[1], chunk, m])
                else:
                    clock[worker] += 2 if kind == "B" else 1
                at[worker] += 1
                moved = True
    assert [len(row) for row in program] == at
    return max(clock)


def test_a_refusal_leaves_the_collector_of_circles_as_it_was():
    made = make_schedule("1f1b", 2, 2)
    for enable in (gc.enable, gc.disable):
        enable()
        before = gc.isenabled()
        try:
            verify(made)
            with pytest.raises(UserError):
                verify(replace(made, actions=made.actions[::-1]))
            assert gc.isenabled() == before
        finally:
            gc.enable()
