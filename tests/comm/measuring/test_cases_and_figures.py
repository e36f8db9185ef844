"""Which cases are measured and what figures come of the seconds: plain arithmetic, held to its laws."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.measuring import cases, figures
from shoal.comm.measuring.cases import Arm, Cell, Settings
from shoal.comm.measuring.figures import Measured, Taken
from shoal.errors import UserError


@given(st.integers(1, 1 << 40))
def test_a_size_that_was_written_reads_back(nbytes):
    assert cases.size(cases.size_text(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("64KiB", 65536), ("64k", 65536), ("2MB", 2_000_000), ("1.5 MiB", 3 << 19), ("4096", 4096), ("7B", 7)],
)
def test_sizes_are_written_as_people_do(text, nbytes):
    assert cases.size(text) == nbytes


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.integers(2, 8))
def test_a_range_rises_from_its_first_to_its_last_size_by_its_factor(low, more, factor):
    found = cases.sizes(f"{low}..{low + more}:{factor}")
    assert (found[0], found[-1]) == (low, low + more)
    assert all(b == a * factor for a, b in pairwise(found[:-1]))
    assert found[-1] <= found[-2] * factor


def test_ranges_and_single_sizes_are_put_in_order():
    assert cases.sizes("1MiB,1KiB..16KiB") == (1 << 10, 1 << 12, 1 << 14, 1 << 20)


@pytest.mark.parametrize("text", ["", "3X", "0", "1KiB..", "4KiB..1KiB", "1KiB..4KiB:1", "1KiB..4KiB:x", "-1", "0.1"])
def test_a_size_that_makes_no_sense_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="size") as refused:
        cases.sizes(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"ops": ("allreduce",)}, "unknown operation 'allreduce': did you mean 'all_reduce'"),
        ({"dtypes": ("float23",)}, "did you mean 'float32'"),
        ({"transports": ("glo",)}, "did you mean 'gloo'"),
        ({"algorithms": ("rign",)}, "did you mean 'ring'"),
        ({"ops": ()}, "at least one operation"),
        ({"workers": 1}, "--workers must be 2 to 40"),
        ({"workers": 41}, "--workers must be 2 to 40"),
        ({"sizes": ()}, "--sizes"),
        ({"rounds": 0}, "--rounds"),
        ({"seconds": float("nan")}, "--seconds"),
        ({"transports": ("gloo",), "zero_copy": True}, "--zero-copy needs a transport"),
        ({"transports": ("shm", "nccl")}, "two runs"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(given_, message):
    with pytest.raises(UserError, match=message):
        Settings(**{"workers": 2, **given_})


@given(
    st.sampled_from(cases.OPS), st.integers(1, 1 << 22), st.sampled_from(sorted(cases.DTYPES)), st.integers(2, 40)
)  # fmt: skip
def test_a_cell_holds_a_whole_block_a_rank_and_is_no_larger_than_asked_unless_it_must(op, nbytes, dtype, workers):
    (cell,) = cases.cells(Settings(workers=workers, ops=(op,), sizes=(nbytes,), dtypes=(dtype,)))
    if op == "barrier":
        assert cell.nbytes == 0
        return
    least = workers if op in cases.BLOCK_OPS else 1
    assert cell.elements >= least
    assert cell.nbytes <= nbytes or cell.elements == least
    assert op not in cases.BLOCK_OPS or cell.elements % workers == 0


def test_every_transport_takes_part_natively_and_by_each_algorithm_that_has_the_operation():
    settings = Settings(
        workers=2, ops=("all_reduce", "all_to_all", "barrier"), sizes=(4, 5), zero_copy=True,
        algorithms=("native", "ring", "pairwise"),
    )  # fmt: skip
    found = cases.cells(settings)
    assert [cell.op for cell in found] == ["all_reduce", "all_to_all", "barrier"], "4 and 5 bytes are one element"
    by_op = {cell.op: list(map(str, cell.arms)) for cell in found}
    assert by_op["all_reduce"] == [
        "gloo", "gloo ring", "gloo pairwise", "shm", "shm zero-copy", "shm ring", "shm pairwise"
    ]  # fmt: skip
    assert by_op["all_to_all"] == ["gloo", "gloo pairwise", "shm", "shm zero-copy", "shm pairwise"]
    assert by_op["barrier"] == ["gloo", "shm"]


@pytest.mark.parametrize(
    ("op", "factor"),
    [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("all_to_all", 0.75), ("broadcast", 1.0),
     ("reduce", 1.0), ("send_recv", 1.0)],
)  # fmt: skip
def test_bus_factors_are_those_of_nccl_tests(op, factor):
    assert figures.bus_factor(op, 4) == factor


CELL = Cell("all_reduce", "float32", 250_000, (Arm("gloo"), Arm("shm"), Arm("shm", zero_copy=True)))


def measured(walls, cpu=1e-3, cell=0, wrong=()):
    """One rank's round: ``walls[arm]`` in ms, memcpy last."""
    return Measured(cell, [Taken([ms / 1e3 for ms in arm], [cpu] * len(arm)) for arm in walls], list(wrong))


def test_the_slowest_rank_counts_then_the_median_of_iterations_then_of_rounds():
    first = [measured([[10, 1, 9], [2, 2, 2], [1, 1, 1], [1, 1, 1]]), measured([[30] * 3, [1] * 3, [1] * 3, [1] * 3])]
    second = [measured([[1, 12, 1], [4, 1, 4], [1, 1, 1], [1, 1, 1]]), measured([[20] * 3, [1] * 3, [1] * 3, [1] * 3])]
    gloo, staged, zero = figures.rows([CELL], [first, second])
    assert gloo.rounds_s == pytest.approx((10e-3, 30e-3)), "of 10, 12, 9 and of 30, 30, 30"
    assert gloo.latency_s == pytest.approx(20e-3)
    assert gloo.min_s == pytest.approx(9e-3)
    assert gloo.iterations == 6
    assert gloo.against is None
    assert staged.rounds_s == pytest.approx((4e-3, 1e-3))
    assert staged.against == pytest.approx((10 / 4 + 30 / 1) / 2)
    assert staged.against_best == pytest.approx(9)
    assert staged.algorithm_bytes_per_s == pytest.approx(1e6 / 2.5e-3)
    assert staged.bus_bytes_per_s == staged.algorithm_bytes_per_s, "2 ranks"
    assert staged.memcpy_share == pytest.approx((1 / 4 + 1 / 1) / 2)
    assert zero.memcpy_share == pytest.approx(1.0)
    assert zero.zero_copy
    assert gloo.cpu_s == pytest.approx(2e-3), "of both ranks"


@given(
    st.permutations(range(3)), st.lists(st.lists(st.floats(1e-6, 1), min_size=4, max_size=4), min_size=3, max_size=3)
)
def test_the_order_of_ranks_decides_nothing(order, values):
    ranks = [[measured([[ms] * 2 for ms in row])] for row in values]
    assert figures.rows([CELL], ranks) == figures.rows([CELL], [ranks[i] for i in order])


def test_an_algorithm_is_held_against_the_same_one_of_the_first_transport():
    arms = (Arm("gloo"), Arm("gloo", "ring"), Arm("shm"), Arm("shm", "ring"), Arm("shm", "pairwise"))
    cell = Cell("all_reduce", "float32", 1, arms)
    rows = figures.rows([cell], [[measured([[8], [6], [4], [3], [2], [1]])]])
    assert [row.against for row in rows] == [None, *map(pytest.approx, (8 / 6, 8 / 4, 6 / 3, 8 / 2))]


def test_a_barrier_has_no_bandwidth():
    (row,) = figures.rows([Cell("barrier", "float32", 0, (Arm("gloo"),))], [[measured([[1], [1]])]])
    assert (row.algorithm_bytes_per_s, row.bus_bytes_per_s, row.memcpy_share) == (None, None, None)


def test_wrong_results_are_told_once():
    ranks = [[measured([], wrong=["a"]), measured([], wrong=["a", "b"])], [measured([], wrong=["c"])]]
    assert figures.wrong(ranks) == ["a", "b", "c"]


@given(st.lists(st.floats(0, 10), min_size=1), st.floats(1e-3, 100))
def test_iterations_fit_the_budget_between_their_bounds(calibrated, budget):
    found = figures.iterations(calibrated, budget, 5, 300)
    assert 5 <= found <= 300
    assert found == 5 or found * sum(calibrated) <= budget * (1 + 1e-9)
