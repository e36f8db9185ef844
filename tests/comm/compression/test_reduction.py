"""Compressed sums: the same bits everywhere, no more bytes than the formula says, and nothing lost for good."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import shoal.comm
from shoal.comm.compression.compressor import COMPRESSORS
from shoal.comm.compression.low_rank import Cut, cuts_of, orthonormal, squarest
from shoal.comm.compression.reduction import SEGMENT, segments, slice_size, slices
from shoal.errors import RunFailed, UserError

NAMES = list(COMPRESSORS)


def numbers(rank: int, elements: int, step: int = 0) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(100 * step + rank))


def by_hand(name: str, elements: int, world: int) -> torch.Tensor:
    """What `CodedReduction` is to give in its first step, written down plainly."""
    operands = [numbers(rank, elements) for rank in range(world)]
    parts = [_segment_by_hand(name, [o[cut.start : cut.stop] for o in operands]) for cut in segments(elements)]
    return torch.cat(parts)


def _segment_by_hand(name: str, operands: list[torch.Tensor]) -> torch.Tensor:
    codec, elements, world = COMPRESSORS[name]().method, len(operands[0]), len(operands)
    out = torch.zeros(elements)
    for owner, own in enumerate(slices(elements, world)):
        total = torch.zeros(len(own))
        for rank in range(world):
            piece = operands[rank][own.start : own.stop].clone()
            if rank != owner:
                payload = torch.zeros(codec.payload_bytes(len(own)), dtype=torch.uint8)
                codec.compress(piece, torch.zeros(len(own)), payload)
                codec.restore(payload, piece)
            total = piece if rank == 0 else total + piece
        payload = torch.zeros(codec.payload_bytes(len(own)), dtype=torch.uint8)
        codec.compress(total, torch.zeros(len(own)), payload)
        codec.restore(payload, out[own.start : own.stop])
    return out


def reduced(rank: int, world: int, sizes: list[int]) -> list[tuple[str, int, bytes, int, int, int]]:
    """(name, elements, bytes of the result, bytes by the formula, bytes counted, bytes handed to torch.distributed)"""
    handed = 0
    all_to_all, all_gather = dist.all_to_all_single, shoal.comm.compression.links.all_gather

    def counting(original, mine):
        def call(out, into, **options):
            nonlocal handed
            handed += mine(into)
            return original(out, into, **options)

        return call

    dist.all_to_all_single = counting(all_to_all, lambda rows: rows.nbytes * (world - 1) // world)
    shoal.comm.compression.links.all_gather = counting(all_gather, lambda row: row.nbytes * (world - 1))
    out = []
    for name in NAMES:
        for elements in sizes:
            compressor, handed = COMPRESSORS[name](), 0
            tensor = shoal.comm.compressed_all_reduce(numbers(rank, elements), compressor)
            formula = compressor.bytes_sent(elements, world)
            out.append((name, elements, tensor.numpy().tobytes(), formula, compressor.sent_bytes, handed))
    return out


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_gets_the_same_bits_for_the_bytes_of_the_formula(world: int, over_gloo) -> None:
    rows = over_gloo(world, reduced, [0, 1, 63, 1000, 20_011, SEGMENT + 777])
    for cases in zip(*rows, strict=True):
        name, elements, first, formula, counted, handed = cases[0]
        assert all(case[2] == first for case in cases), (name, elements)
        assert all(case[3:] == (formula, formula, formula) for case in cases), (
            name,
            elements,
            formula,
            counted,
            handed,
        )
        got = torch.frombuffer(bytearray(first), dtype=torch.float32) if elements else torch.zeros(0)
        if world == 1:
            assert torch.equal(got, numbers(0, elements))
        elif name != "powersgd":
            assert torch.equal(got, by_hand(name, elements, world)), (name, elements)


def told_in_the_end(rank: int, world: int, name: str, feedback: bool, steps: int) -> tuple[float, float]:
    """The same gradient step after step: how far the sum of all results is from what was to be told, in steps."""
    options = {"share": 0.1} if name == "topk" else {"rank": 2} if name == "powersgd" else {}
    compressor = COMPRESSORS[name](error_feedback=feedback, **options)
    shape = (64, 48)
    exact = sum(numbers(r, 64 * 48) for r in range(world)).view(shape)
    told = torch.zeros(shape)
    first = 0.0
    for step in range(steps):
        told += shoal.comm.compressed_all_reduce(numbers(rank, 64 * 48).view(shape).clone(), compressor, name="w")
        if step == 0:
            first = float((told - exact).norm() / exact.norm())
    return first, float((told - steps * exact).norm() / exact.norm())


@pytest.mark.parametrize("name", NAMES)
def test_with_feedback_what_is_left_unsent_stays_bounded_and_without_it_grows(name: str, over_gloo) -> None:
    """The same gradient 120 times: without feedback losses add up; with it, a few steps are pending."""
    first, with_feedback = over_gloo(2, told_in_the_end, name, True, 120)[0]
    _, without = over_gloo(2, told_in_the_end, name, False, 120)[0]
    assert first > 1e-8  # it is lossy
    assert without == pytest.approx(120 * first, rel=0.1)
    # matrices and 1-bit first have to learn what a step looks like, or how large the largest are
    assert with_feedback < (0.2 * without if name in ("topk", "1bit", "powersgd") else 2 * first)


def resumed(rank: int, world: int, name: str) -> bool:
    """Going on from a saved state, to the bit."""

    def run(compressor, steps):
        out = None
        for step in steps:
            out = shoal.comm.compressed_all_reduce(numbers(rank, 5000, step).view(50, 100), compressor, name="w")
        return out

    whole, first, second = (COMPRESSORS[name]() for _ in range(3))
    expected = run(whole, range(6))
    run(first, range(3))
    second.load_state_dict(first.state_dict())
    forgetful = run(COMPRESSORS[name](), range(3, 6))
    return torch.equal(run(second, range(3, 6)), expected) and not torch.equal(forgetful, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_compressor_goes_on_to_the_bit(name: str, over_gloo) -> None:
    assert over_gloo(2, resumed, name) == [True, True]


def other_types(rank: int, world: int) -> list[bool]:
    compressor = shoal.comm.FP16()
    half = shoal.comm.compressed_all_reduce(torch.full((300,), rank + 1.0, dtype=torch.bfloat16), compressor)
    strided = torch.zeros(40, 60).t()
    strided.fill_(rank + 1.0)
    shoal.comm.compressed_all_reduce(strided, compressor, average=True)
    strange = torch.ones(5000)
    strange[4000] = torch.inf
    shoal.comm.compressed_all_reduce(strange, int8 := shoal.comm.Int8())
    after = shoal.comm.compressed_all_reduce(torch.ones(5000), int8)
    refused = False
    try:
        shoal.comm.compressed_all_reduce(torch.ones(5, dtype=torch.int32), compressor)
    except UserError:
        refused = True
    return [
        bool((half == 3).all()) and half.dtype == torch.bfloat16,
        bool((strided == 1.5).all()),
        not bool(strange.isfinite().all()),
        bool(after.isfinite().all()),
        refused,
    ]


def test_tensors_of_other_types_and_strides_and_numbers_that_are_not_finite(over_gloo) -> None:
    assert over_gloo(2, other_types) == [[True] * 5] * 2


def mismatched(rank: int, world: int) -> None:
    """One rank says top-k, the other int8, with payloads of one size: planted."""
    from shoal.comm.compression.int8 import Int8Blocks

    if rank:

        class Other(Int8Blocks):
            kind = 9

        compressor = shoal.comm.Compressor(Other())
    else:
        compressor = shoal.comm.Int8()
    shoal.comm.compressed_all_reduce(torch.ones(1000), compressor)


def test_ranks_with_different_codecs_are_told_apart(over_gloo) -> None:
    with pytest.raises(RunFailed, match="expected int8 of"):
        over_gloo(2, mismatched)


@given(elements=st.integers(0, 1 << 40), world=st.integers(1, 64))
def test_slices_cover_everything_once_in_order(elements: int, world: int) -> None:
    cut = slices(elements, world)
    assert [piece.start for piece in cut] == [0, *(piece.stop for piece in cut)][:-1]
    assert cut[-1].stop == elements
    assert all(len(piece) <= slice_size(elements, world) for piece in cut)


@given(shapes=st.lists(st.lists(st.integers(0, 200), max_size=3), max_size=6), rank=st.integers(1, 8))
def test_matrices_and_the_rest_cover_everything_once_in_order(shapes: list[list[int]], rank: int) -> None:
    cuts = cuts_of(shapes, rank)
    assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts)][: len(cuts)]
    assert (cuts[-1].stop if cuts else 0) == sum(int(torch.Size(shape).numel()) for shape in shapes)
    assert all(2 * rank * (cut.rows + cut.columns) <= cut.rows * cut.columns for cut in cuts if cut.columns)
    assert cuts_of([(64, 64), (5,), (7,), (64, 8, 8)], 4) == [Cut(0, 64, 64), Cut(4096, 12), Cut(4108, 64, 64)]


@given(elements=st.integers(0, 1 << 40))
def test_the_squarest_matrix_leaves_little(elements: int) -> None:
    (rows, columns), (rest,) = squarest(elements)
    assert rows * columns + rest == elements
    assert rest <= rows
    assert rows <= columns <= rows + 2


def test_a_basis_is_orthonormal_and_what_adds_nothing_is_zero() -> None:
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    rows[2] = 2 * rows[0] - rows[1]
    basis = orthonormal(rows)
    torch.testing.assert_close(basis @ basis.t(), torch.diag(torch.tensor([1.0, 1, 0, 1])), rtol=0, atol=1e-6)
    torch.testing.assert_close((rows @ basis.t()) @ basis, rows, rtol=0, atol=1e-5)
    assert not bool(orthonormal(torch.zeros(2, 5)).any())
