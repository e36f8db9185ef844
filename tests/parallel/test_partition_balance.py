"""Cuts are placed so that the slowest stage is as fast as can be."""

import math
import statistics
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel.models import AWKWARD
from torch import nn

from shoal.errors import UserError
from shoal.parallel.partition.balance import balance, slowest
from shoal.parallel.partition.measure import pieces
from shoal.parallel.partition.operations import Operations
from shoal.parallel.partition.pieces import Piece


def piece(seconds: float = 1.0, parameters: int = 0, activations: int = 0, output: int = 1) -> Piece:
    return Piece("layer", seconds, parameters, activations, output)


PIECES = st.lists(
    st.builds(piece, st.integers(0, 9).map(float), st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)),
    min_size=1,
    max_size=8,
)


def all_cuts(size: int, count: int) -> list[tuple[int, ...]]:
    return list(combinations(range(1, size), count - 1))


@settings(max_examples=200)
@given(table=PIECES, data=st.data())
def test_no_cut_has_a_faster_slowest_chunk_and_none_as_fast_sends_less(table: list[Piece], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(table)))
    speeds = data.draw(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=count, max_size=count))
    cuts = balance(table, count, speeds=speeds, slack=0.0)
    times = {other: slowest(table, other, speeds) for other in all_cuts(len(table), count)}
    assert times[cuts] == min(times.values())
    sent = {other: sum(table[c - 1].output_bytes for c in other) for other, t in times.items() if t == times[cuts]}
    assert sent[cuts] == min(sent.values())


@settings(max_examples=200)
@given(table=PIECES, data=st.data())
def test_no_chunk_is_larger_than_its_device_and_a_cut_is_found_if_there_is_one(
    table: list[Piece], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, min(4, len(table))))
    room = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    held = data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))

    def fits(cuts: tuple[int, ...]) -> bool:
        chunks = [table[a:b] for a, b in pairwise((0, *cuts, len(table)))]
        needs = [
            sum(4 * p.parameter_bytes + n * p.activation_bytes for p in c) for c, n in zip(chunks, held, strict=True)
        ]
        return all(need <= size for need, size in zip(needs, room, strict=True))

    possible = [cuts for cuts in all_cuts(len(table), count) if fits(cuts)]
    options = {"capacity_bytes": room, "states": 4.0, "in_flight": held, "slack": 0.0}
    if possible:
        cuts = balance(table, count, **options)  # type: ignore[arg-type]
        assert cuts in possible
        assert slowest(table, cuts) == min(slowest(table, other) for other in possible)
    else:
        with pytest.raises(UserError, match="fits the memory"):
            balance(table, count, **options)  # type: ignore[arg-type]


def loads(table: list[Piece], cuts: tuple[int, ...], workers: list[int]) -> list[float]:
    chunks = [sum(p.seconds for p in table[a:b]) for a, b in pairwise((0, *cuts, len(table)))]
    return [sum(c for c, w in zip(chunks, workers, strict=True) if w == worker) for worker in sorted(set(workers))]


@settings(max_examples=100)
@given(table=st.lists(st.builds(piece, st.integers(1, 9).map(float)), min_size=6, max_size=12), v_shape=st.booleans())
def test_chunks_of_one_worker_count_together(table: list[Piece], v_shape: bool) -> None:
    """The local search is never worse than equal chunks, and no single cut that is moved makes it better."""
    workers = [0, 1, 2, 2, 1, 0] if v_shape else [0, 1, 2, 0, 1, 2]
    cuts = balance(table, 6, workers=workers)
    best = max(loads(table, cuts, workers))
    assert best <= max(loads(table, balance(table, 6), workers))
    for number, (before, after) in enumerate(zip((0, *cuts), (*cuts[1:], len(table)), strict=False)):
        for place in range(before + 1, after):
            moved = (*cuts[:number], place, *cuts[number + 1 :])
            assert max(loads(table, moved, workers)) >= best


def test_two_chunks_of_a_worker_even_out_what_one_cannot() -> None:
    table = [piece(s) for s in (3.0, 2.0, 2.0, 1.0)]
    assert max(loads(table, balance(table, 2), [0, 1])) == 5.0
    v_shape = [0, 1, 1, 0]
    assert loads(table, balance(table, 4, workers=v_shape), v_shape) == [4.0, 4.0]


def test_a_little_time_is_given_for_fewer_bytes() -> None:
    table = [piece(1.0, output=1), piece(0.01, output=900), piece(1.0)]
    assert balance(table, 2, slack=0.0) in ((1,), (2,))
    assert balance(table, 2, slack=0.02) == (1,)
    block = [piece(1.0, output=9), piece(1.0, output=9), piece(1.0, output=2), piece(1.005, output=9), piece(1.0)] * 2
    assert balance(block, 2) == (5,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 0}, "at least 1 chunk, not 0"),
        ({"count": 4}, "the model has 3 pieces, too few for 4 chunks: take at most 3"),
        ({"count": 2, "speeds": [1.0]}, "speeds = [1.0]: give one number above 0 for each of the 2 chunks"),
        ({"count": 2, "speeds": [1.0, 0.0]}, "speeds = [1.0, 0.0]"),
        (
            {"count": 2, "capacity_bytes": [9, 9]},
            "the largest piece, 'layer', needs 10 bytes, the model 30, and they have 18",
        ),
    ],
)
def test_what_cannot_be_balanced_is_one_line(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as error:
        balance([piece(parameters=10)] * 3, **options)  # type: ignore[arg-type]
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_many_layers_on_many_devices_are_balanced_quickly() -> None:
    """600 pieces in 64 chunks: the work grows with the pieces of a chunk, not with all pairs of places."""
    table = [piece(1.0 + 0.37 * (i % 7)) for i in range(600)]
    cuts = balance(table, 64)
    assert slowest(table, cuts) < 1.15 * sum(p.seconds for p in table) / 64


class Widths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.last = nn.Linear(8, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.wide(self.narrow(x)).tanh())


def test_counted_operations_and_bytes_are_those_of_the_layers() -> None:
    table = pieces(Widths(), (torch.randn(16, 8),), clock=False)
    assert [p.name for p in table] == ["narrow", "wide", "last"]
    matmuls = [2 * 16 * 8 * 64, 2 * 16 * 64 * 64, 2 * 16 * 64 * 2]
    made = [16 * 64, 16 * 64, 16 * 2]
    assert [p.seconds for p in table] == [3 * (a + b) / 1e9 for a, b in zip(matmuls, made, strict=True)]
    assert [p.parameter_bytes for p in table] == [4 * (8 * 64 + 64), 4 * 64 * 64, 4 * (64 * 2 + 2)]
    assert [p.output_bytes for p in table] == [4 * 16 * 64, 4 * 16 * 64, 0]
    narrow, wide, last = (p.activation_bytes for p in table)
    assert narrow == 4 * 16 * 8, "its input"
    assert wide == 2 * 4 * 16 * 64, "its input, and what tanh gives"
    assert last == 4 * 16 * 64


def test_recurrent_layers_are_counted_too() -> None:
    lstm, x = nn.LSTM(8, 16), torch.randn(5, 3, 8)
    with Operations() as counted, torch.no_grad():
        lstm(x)
    assert counted.total == 2 * 5 * 3 * 4 * 16 * (8 + 16)


def test_the_clock_finds_the_slow_layer() -> None:
    class Slow(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            for _ in range(200):
                input = input * 1.0
            return super().forward(input)

    model = nn.Sequential(nn.Linear(8, 8), Slow(8, 8), nn.Linear(8, 8))
    table = pieces(model, (torch.randn(64, 8),), runs=3)
    assert table[1].seconds > 5 * statistics.mean((table[0].seconds, table[2].seconds))
    assert balance(table, 3) == (1, 2)


def test_frozen_layers_cost_no_backward_pass_and_keep_nothing() -> None:
    awkward = AWKWARD["frozen"]
    table = pieces(awkward.build(), awkward.batch, runs=1)
    assert [p.activation_bytes > 0 for p in table] == [False, False, False, True, True]
    assert all(math.isfinite(p.seconds) for p in table)


def test_pieces_need_an_example() -> None:
    with pytest.raises(UserError, match="cannot be measured without an example batch"):
        pieces(nn.Sequential(nn.Linear(2, 2)), None)
