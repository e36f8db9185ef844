"""What each schedule is: legal for any numbers, the theory's own bubble and memory, and the order that torch has."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.parallel.schedules import Kind, make_schedule, verify
from shoal.parallel.schedules.activations import peak_activations
from shoal.parallel.schedules.formulas import bubble, full_peak, idle, peak
from shoal.parallel.schedules.registry import MAKERS
from shoal.parallel.schedules.simulation import Times, simulate

WORKERS, MICRO_BATCHES = (1, 2, 3, 4, 5, 8), (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17)
GRID = [(p, m) for p in WORKERS for m in MICRO_BATCHES]


def chunks_to_try(name: str) -> tuple[int, ...]:
    return (1, 2, 3) if MAKERS[name].chunks is None else (1,)


@pytest.mark.parametrize("name", MAKERS)
def test_the_simulated_bubble_is_the_formulas_for_any_numbers(name):
    for p, m in GRID:
        for v in chunks_to_try(name):
            line = simulate(make_schedule(name, p, m, v))
            assert line.bubble == pytest.approx(bubble(name, p, m, v), abs=1e-12), (p, m, v)
            assert line.span - line.busy(0) == idle(name, p, m, v), (p, m, v)


@pytest.mark.parametrize("name", MAKERS)
def test_the_activations_kept_are_the_formulas_on_every_worker(name):
    for p, m in GRID:
        for v in chunks_to_try(name):
            peaks = peak_activations(make_schedule(name, p, m, v))
            assert [k.together for k in peaks] == [peak(name, w, p, m, v) for w in range(p)], (p, m, v)
            if name not in ("zb-v", "dualpipe-v"):
                assert [k.full for k in peaks] == [full_peak(name, w, p, m, v) for w in range(p)], (p, m, v)


def test_the_formulas_are_those_of_the_papers():
    p, m, v = 4, 16, 3
    assert bubble("gpipe", p, m) == bubble("1f1b", p, m) == (p - 1) / (m + p - 1)
    assert bubble("interleaved", p, m, v) == bubble("breadth-first", p, m, v) == (p - 1) / (v * m + p - 1)
    assert idle("zb-h1", p, m) * 3 == idle("1f1b", p, m), "a third, as F, I and W take equally long"
    assert simulate(make_schedule("zb-h2", p, m)).inner_bubble == 0
    assert simulate(make_schedule("zb-v", p, m)).inner_bubble == 0
    memory = {name: peak(name, 0, p, m) for name in MAKERS if MAKERS[name].chunks}
    assert memory == {"off": 1, "gpipe": m, "1f1b": p, "zb-h1": p, "zb-h2": 2 * p - 1, "zb-v": 2 * p, "dualpipe-v": 9}


@given(data=st.data(), p=st.integers(1, 9), m=st.integers(1, 20), v=st.integers(1, 4))
@settings(max_examples=150)
def test_every_schedule_that_is_made_passes_its_verification(data, p, m, v):
    name = data.draw(st.sampled_from(sorted(MAKERS)))
    schedule = make_schedule(name, p, m, 1 if MAKERS[name].chunks else v)
    verified = verify(schedule, most_in_flight=max(peak(name, w, p, m, schedule.chunks // p) for w in range(p)))
    sends = sum(action.kind in (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT) for row in verified.program for action in row)
    borders = sum(a != b for a, b in zip(schedule.placement, schedule.placement[1:], strict=False))
    assert sends == 2 * m * borders, "one activation and one gradient over each border between workers"


def test_no_border_inside_of_a_worker_is_sent_over():
    program = verify(make_schedule("zb-v", 3, 4)).program
    assert not [a for a in program[2] if a.kind is Kind.SEND_ACTIVATION and a.chunk == 2], (
        "chunks 2 and 3 are neighbours"
    )


def torchs(name: str, p: int, m: int, v: int) -> list[list[str]]:
    """The compute order of torch.distributed.pipelining, with overlapped pairs one after the other."""
    from torch.distributed.pipelining import schedules as theirs

    kinds = {
        "interleaved": theirs.ScheduleInterleaved1F1B,
        "zb-v": theirs.ScheduleZBVZeroBubble,
        "dualpipe-v": theirs.ScheduleDualPipeV,
    }
    rounds = max(1, m // p)
    facts = SimpleNamespace(
        pp_group_size=p, num_stages=p * v, _n_microbatches=m, n_local_stages=v, microbatches_per_round=m // rounds
    )
    rows = [kinds[name]._calculate_single_rank_operations(facts, rank) for rank in range(p)]
    flat = [[part for action in row if action for part in (action.sub_actions or (action,))] for row in rows]
    return [[f"{a.computation_type.value}{a.stage_index}.{a.microbatch_index}" for a in row] for row in flat]


@pytest.mark.parametrize(
    ("name", "p", "m", "v"),
    [
        *(("interleaved", p, m, v) for p, m in ((2, 4), (4, 8), (4, 16), (3, 5)) for v in (2, 3)),
        *(("zb-v", p, m, 2) for p, m in ((2, 2), (3, 9), (4, 7), (4, 16))),
        *(("dualpipe-v", p, m, 2) for p, m in ((2, 4), (3, 6), (4, 8), (4, 16))),
    ],
)
def test_the_order_is_that_of_torch(name, p, m, v):
    ours = [[str(action) for action in row] for row in make_schedule(name, p, m, v).actions]
    assert ours == torchs(name, p, m, v)


def test_times_of_each_chunk_and_of_the_link_move_the_timeline():
    schedule = make_schedule("gpipe", 2, 1)
    line = simulate(schedule, Times((1.0, 5.0), (2.0, 7.0), (3.0, 11.0), link=0.5))
    assert line.starts == ((0.0, 25.0), (1.5, 6.5)), "F 1, link 0.5, F 5, B 7 + 11, link 0.5, B 2 + 3"
    assert line.span == 30.0
    assert line.bubble == pytest.approx(1 - (6 + 23) / 60)


@pytest.mark.parametrize(
    ("name", "messages"),
    [("gpipe", 6), ("1f1b", 16), ("zb-h1", 12), ("zb-h2", 3), ("zb-v", 13), ("dualpipe-v", 12)],
)
def test_a_step_takes_longer_by_the_messages_that_wait_for_each_other(name, messages):
    """As docs/schedules.md tells for 4 workers and 8 micro-batches."""
    schedule = make_schedule(name, 4, 8)
    late = 1 / 1024  # of a pass
    with_messages = simulate(schedule, replace(Times.equal(schedule.chunks), link=late))
    assert (with_messages.span - simulate(schedule).span) / late == messages


def test_sizes_of_activations_count_by_chunk_and_by_what_a_weight_gradient_still_needs():
    schedule = make_schedule("zb-h1", 2, 4)
    (first, last) = peak_activations(schedule, full=[10, 100], kept=[4, 40])
    assert (first.full, first.kept, first.together) == (20, 4, 20)
    assert (last.full, last.kept, last.together) == (100, 80, 140)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("1f1p", 2, 4), "did you mean '1f1b'"),
        (("1f1b", 2, 4, 2), "use 'interleaved'"),
        (("zb-v", 2, 4, 3), "2 chunks a worker"),
        (("gpipe", 0, 4), "at least 1"),
        (("gpipe", 2, 0), "at least 1"),
    ],
)
def test_numbers_and_names_that_do_not_fit_are_refused_with_the_repair(arguments, says):
    with pytest.raises(UserError, match=says):
        make_schedule(*arguments)
