"""Programs on tensors, all ranks in one process: exact sums for every algorithm, size and type."""

import pytest
import torch
from collective_cases import (
    IN_PLACE,
    PAIRS,
    any_program,
    copies,
    equal,
    expected,
    operands,
    programs,
    results,
    simulate,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.comm.collectives.actions import REDUCING, Add, Copy, Program, Receive, Send, block_sizes
from shoal.comm.collectives.check import ProgramError, check
from shoal.comm.collectives.execute import carry_out
from shoal.comm.collectives.registry import build
from shoal.comm.transports.contract import drive
from shoal.comm.transports.loopback import Loopback
from shoal.comm.tree import tree_sum
from shoal.errors import UserError

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
REALS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
SIZES = [0, 1, 5, 31, 257]  # elements of a block: none, fewer than chunks, odd


def holds(program, sizes, dtype, **options):
    given = operands(program, sizes, dtype)
    kept = copies(given)
    into = results(program, sizes, given)
    want = expected(program, sizes, given)
    simulate(program, given, into, sizes, **options)
    assert equal(into, want), program.headline()
    changed = [r for r in range(program.ranks) if program.collective not in IN_PLACE or into[r] is None]
    assert equal([given[r] for r in changed], [kept[r] for r in changed]), "an operand was overwritten"


@pytest.mark.parametrize(("collective", "name"), [pair for pair in PAIRS if pair[0] != "barrier"])
def test_every_algorithm_gives_exact_sums_for_1_to_9_ranks_and_odd_sizes(collective, name):
    for ranks in range(1, 10):
        for number, program in enumerate(programs(collective, name, ranks)):
            holds(program, [SIZES[(ranks + number) % 5]] * program.blocks, torch.int32)


@pytest.mark.parametrize("dtype", [*INTEGERS, *REALS, *COMPLEX, torch.bool], ids=str)
def test_every_algorithm_gives_exact_sums_in_every_type(dtype):
    for collective, name in PAIRS:
        if collective != "barrier" and (dtype is not torch.bool or collective not in REDUCING):
            program = build(collective, name, 5, hosts=[0, 0, 1, 1, 1], root=2 if collective == "broadcast" else 0)
            holds(program, [37] * program.blocks, dtype)


@settings(max_examples=30)
@given(any_program(most_ranks=9), st.data())
def test_any_program_gives_exact_sums_for_blocks_of_any_sizes(program, data):
    if program.collective != "barrier":
        many = data.draw(st.lists(st.integers(0, 70), min_size=program.blocks, max_size=program.blocks))
        sizes = many if program.blocks > 1 else many[:1]
        holds(program, sizes, torch.int64)


@pytest.mark.parametrize(
    ("op", "combine"), [("max", torch.maximum), ("min", torch.minimum), ("prod", torch.mul), ("sum", torch.add)]
)
def test_every_reducing_algorithm_does_every_operation(op, combine):
    for collective, name in PAIRS:
        if collective in REDUCING:
            program = build(collective, name, 5, hosts=[0, 0, 1, 1, 1])
            for dtype in (torch.int32, torch.float32, torch.bfloat16):
                given = operands(program, [41] * program.blocks, dtype)
                into = results(program, [41] * program.blocks, given)
                want = expected(program, [41] * program.blocks, given, combine)
                simulate(program, given, into, [41] * program.blocks, op=op)
                assert equal(into, want), (program.headline(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16], ids=str)
def test_an_average_is_the_sum_divided_once(dtype):
    for collective, name in PAIRS:
        if collective in REDUCING:
            program = build(collective, name, 6, hosts=[0, 0, 1, 1, 1, 2])
            given = operands(program, [29] * program.blocks, dtype, spread=9)
            into = results(program, [29] * program.blocks, given)
            wide = torch.float32 if dtype is torch.bfloat16 else dtype
            sums = expected(program, [29] * program.blocks, [tensor.to(wide) for tensor in given])
            simulate(program, given, into, [29] * program.blocks, op="avg")
            assert equal(into, [None if total is None else (total / 6).to(dtype) for total in sums]), program.headline()


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_half_precision_are_rounded_once_whatever_the_algorithm(dtype):
    """Whole numbers whose sums are exact in float32, but not in half: only one rounding gives these bits."""
    for collective, name in PAIRS:
        if collective in REDUCING:
            for ranks in (2, 5, 8):
                program = build(collective, name, ranks, hosts=[rank // 3 for rank in range(ranks)])
                sizes = [67] * program.blocks
                given = operands(program, sizes, dtype, spread=250)
                into = results(program, sizes, given)
                want = expected(program, sizes, given)
                simulate(program, given, into, sizes)
                assert equal(into, want), program.headline()


def test_to_round_at_every_hop_moves_fewer_bytes_and_gives_other_bits():
    program = build("all_reduce", "ring", 8)
    given = operands(program, [512], torch.bfloat16, spread=250)
    want = expected(program, [512], given)
    hop, once = copies(given), copies(given)
    narrow = simulate(program, hop, hop, [512], rounding="hop")
    wide = simulate(program, once, once, [512])
    assert equal(once, want)
    assert not equal(hop, want)
    part = 512 // 8 * 2
    assert sum(narrow.sent.values()) == 8 * 14 * part
    assert sum(wide.sent.values()) == 8 * (14 + 6) * part  # six of seven hops carry a sum that lacks operands


@pytest.mark.parametrize("name", ["direct", "two_shot", "canonical", "pairwise"])
def test_where_one_rank_adds_all_operands_half_precision_moves_half_the_bytes(name):
    program = build("all_reduce", name, 4)
    sent = []
    for dtype in (torch.float32, torch.bfloat16):
        given = operands(program, [256], dtype)
        moved = sum(simulate(program, given, given, [256]).sent.values())
        assert moved == sum(simulate(program, given, given, [256], rounding="hop").sent.values())
        sent.append(moved)
    if name != "pairwise":
        assert sent[0] == 2 * sent[1]


# ---- bits


@settings(max_examples=12)
@given(ranks=st.integers(1, 12), size=st.integers(1, 60), seed=st.integers(0, 999))
def test_the_canonical_algorithm_has_the_bits_of_tree_sum(ranks, size, seed):
    generator = torch.Generator().manual_seed(seed)
    for collective in ("all_reduce", "reduce"):
        tensors = [torch.randn(size, generator=generator, dtype=torch.float64) * 10.0**rank for rank in range(ranks)]
        want = torch.tensor([tree_sum([float(t[i]) for t in tensors]) for i in range(size)], dtype=torch.float64)
        program = build(collective, "canonical", ranks)
        simulate(program, tensors, [tensors[0], *[None] * (ranks - 1)] if collective == "reduce" else tensors, [size])
        assert torch.equal(tensors[0], want)
        assert collective == "reduce" or all(torch.equal(t, want) for t in tensors)


@settings(max_examples=20)
@given(st.sampled_from([name for collective, name in PAIRS if collective == "all_reduce"]), st.integers(2, 9))
def test_all_ranks_get_the_same_bits(name, ranks):
    generator = torch.Generator().manual_seed(ranks)
    tensors = [torch.randn(97, generator=generator) * 1000.0**rank for rank in range(ranks)]
    simulate(build("all_reduce", name, ranks, hosts=[r // 2 for r in range(ranks)]), tensors, tensors, [97])
    assert all(torch.equal(tensors[0], tensor) for tensor in tensors)


# ---- memory


@pytest.mark.parametrize("name", ["ring", "halving_doubling", "two_shot", "direct"])
def test_temporary_memory_is_used_again(name, monkeypatch):
    """A ring of 8 needs room for one slice; nobody more than for what comes at once."""
    taken: list[int] = []
    make = torch.empty

    def counted(size, **options):
        taken.append(size)
        return make(size, **options)

    program = build("all_reduce", name, 8)
    given = operands(program, [1024], torch.float32)
    monkeypatch.setattr(torch, "empty", counted)
    simulate(program, given, given, [1024])
    at_once = {"ring": 128, "halving_doubling": 512 + 256 + 128, "two_shot": 7 * 128, "direct": 7 * 1024}
    assert sum(taken) == 8 * at_once[name]


def test_a_reduce_scatter_makes_its_sums_in_the_buffers_that_came():
    """The operand is only read, yet no copy of it is made."""
    program = build("reduce_scatter", "ring", 4)
    given = operands(program, [64] * 4, torch.float32)
    network = Loopback(4)
    copied = []

    def steps(end):
        end.worked = lambda reduced, count: copied.append(count)
        return carry_out(end, program, given[end.rank], torch.empty(64))

    network.run(steps)
    assert sum(copied) == 0


# ---- what does not fit


def run_alone(program, operand, result, **options):
    ends = []
    Loopback(program.ranks).run(lambda end: ends.append(end) or iter_nothing())
    drive(carry_out(ends[0], program, operand, result, **options))


def iter_nothing():
    return
    yield


@pytest.mark.parametrize(
    ("program", "operand", "result", "options", "said"),
    [
        (build("all_gather", "ring", 2), torch.zeros(3), torch.zeros(7), {}, "the result must have 6 elements"),
        (build("reduce_scatter", "ring", 2), torch.zeros(3), torch.zeros(1), {}, "do not divide into 2 equal blocks"),
        (build("all_reduce", "ring", 2), None, None, {}, "so it must be told the sizes"),
        (build("all_reduce", "ring", 2), torch.zeros(3), torch.zeros(3), {"op": "summ"}, "did you mean 'sum'?"),
        (build("all_reduce", "ring", 2), torch.zeros(3), torch.zeros(3), {"rounding": "one"}, "did you mean 'once'?"),
        (
            build("all_reduce", "ring", 2),
            torch.zeros(3, dtype=torch.int32),
            torch.zeros(3, dtype=torch.int32),
            {"op": "avg"},
            "no average of int32",
        ),
        (
            build("all_reduce", "ring", 2),
            torch.zeros(3, dtype=torch.complex64),
            torch.zeros(3, dtype=torch.complex64),
            {"op": "max"},
            "complex64 has no order",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_sent(program, operand, result, options, said):
    with pytest.raises(UserError) as told:
        run_alone(program, operand, result, **options)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_a_program_for_other_ranks_or_lanes_is_refused():
    with pytest.raises(UserError, match="made for 3 ranks, but the group has 2"):
        Loopback(2).run(lambda end: carry_out(end, build("all_reduce", "ring", 3), torch.zeros(1), torch.zeros(1)))


def test_a_program_that_is_wrong_is_not_run():
    wrong = Program(collective="all_reduce", algorithm="mine", ranks=2, rounds=(((Send(1, 0),),), ((Receive(0, 0),),)))
    tensors = [torch.ones(3), torch.ones(3)]
    with pytest.raises(ProgramError, match="lacks the operand"):
        Loopback(2).run(lambda end: carry_out(end, wrong, tensors[end.rank], tensors[end.rank]))
    assert all(torch.equal(tensor, torch.ones(3)) for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["sum", "avg"])
def test_sums_that_are_made_in_scratch_and_copied_are_finished_too(dtype, op):
    """No algorithm here does so, but a program of one's own may."""
    rounds = tuple(
        ((Send(1 - r, 0), Receive(1 - r, 1), Copy(2, 0), Add(2, 1, other_first=r == 1), Copy(0, 2)),) for r in range(2)
    )
    program = Program(collective="all_reduce", algorithm="mine", ranks=2, rounds=rounds, scratch=(0, 0))
    check(program)
    given = operands(program, [37], dtype, spread=250)
    sums = expected(program, [37], [tensor.double() for tensor in given])
    simulate(program, given, given, [37], op=op)
    assert equal(given, [(total / (2 if op == "avg" else 1)).to(dtype) for total in sums])


def test_sizes_of_blocks_that_do_not_divide_are_spread():
    assert block_sizes("all_gather", 3, 8) == [3, 3, 2]
    assert block_sizes("all_to_all", 2, 3) == [2, 1, 2, 1]
    assert block_sizes("all_reduce", 3, 8) == [8]
