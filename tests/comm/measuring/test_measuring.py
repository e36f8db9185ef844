"""What ranks do when collectives are measured: they go together, get right results, and a wrong one is seen."""

import io
import json
import os
import socket
import time
from contextlib import redirect_stdout

import pytest
import torch

from shoal.comm.measuring import checkup, figures, groups, sweep
from shoal.comm.measuring.cases import OPS, Settings, cells
from shoal.comm.measuring.gate import gate
from shoal.comm.measuring.operations import DIGITS, PERIOD, tensors
from shoal.comm.measuring.rank import measure
from shoal.comm.native import build
from shoal.errors import UserError


def reference(op, ranks):
    """What a collective gives, by the plainest means, in one process."""
    inputs = [t.input.clone() for t in ranks]
    world, block = len(ranks), ranks[0].block
    for t in ranks:
        mine = slice(t.rank * block, (t.rank + 1) * block)
        if op == "all_reduce" or (op == "reduce" and t.rank == 0):
            t.output.copy_(sum(inputs))
        elif op == "broadcast" or (op == "send_recv" and t.rank == world - 1):
            t.output.copy_(inputs[0])
        elif op == "all_gather" or (op == "gather" and t.rank == 0):
            t.output.copy_(torch.cat(inputs))
        elif op == "reduce_scatter":
            t.output.copy_(sum(inputs)[mine])
        elif op == "scatter":
            t.output.copy_(inputs[0][mine])
        elif op == "all_to_all":
            t.output.copy_(torch.cat([each[mine] for each in inputs]))


def in_one_process(op, world=3, elements=3 * (PERIOD + 700), dtype=torch.float32):
    made = [tensors(op, elements, rank, world, lambda n: torch.zeros(n, dtype=dtype)) for rank in range(world)]
    for t in made:
        t.fill()
    return made


MOVING = [op for op in OPS if op != "barrier"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("op", MOVING)
def test_what_a_collective_must_give_is_right(op, dtype):
    made = in_one_process(op, dtype=dtype)
    reference(op, made)
    assert all(t.right() for t in made)


def _results(op, made):
    """The ranks whose output is a result."""
    only = {"reduce": [0], "gather": [0], "send_recv": [len(made) - 1]}
    return [made[rank] for rank in only.get(op, range(len(made)))]


@pytest.mark.parametrize("op", MOVING)
def test_a_result_is_wrong_when_one_element_a_block_or_all_of_it_is(op):
    made = in_one_process(op)
    if op not in ("broadcast", "send_recv"):  # whose root has its result from the start
        assert not any(t.right() for t in _results(op, made)), "nothing was done yet"
    reference(op, made)
    for t in _results(op, made):
        whole = t.output.clone()
        t.output[len(t.output) // 2] += 1
        assert not t.right(), "one element"
        t.output.copy_(whole.roll(len(whole) // 3))
        assert not t.right(), "blocks at each other's places"
        t.output.copy_(whole.roll(1))
        assert not t.right(), "shifted by one"
        t.output.copy_(whole)
        assert t.right()


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter", "reduce"])
def test_a_sum_is_wrong_when_an_operand_is_missing_or_there_twice(op):
    made = in_one_process(op)
    mine = slice(0, made[0].block) if op == "reduce_scatter" else slice(None)
    reference(op, made)
    right = made[0].output.clone()
    again = in_one_process(op)[2].input[mine]
    for other in (right - again, right + again):
        made[0].output.copy_(other)
        assert not made[0].right()


def test_repetitions_start_from_zeros_and_something_left_over_is_seen():
    made = in_one_process("all_reduce")[0]
    assert not made.rested()
    made.rest()
    assert made.rested()
    made.output[5] = DIGITS
    assert not made.rested()


def _through(group, cores, times):
    ready = gate(group, cores)
    seen = []
    for turn in range(times):
        if (turn + group.rank) % group.world == 0:  # come late, each in turn
            sum(range(20_000))
        came = time.monotonic_ns()
        ready()
        seen.append((came, time.monotonic_ns()))
    return seen


@pytest.mark.parametrize("cores", [3, 1])
def test_nobody_goes_before_all_have_come(on_workers, cores):
    ranks = on_workers(3, _through, cores, 15)
    for turn in zip(*ranks, strict=True):
        assert max(came for came, _ in turn) <= min(went for _, went in turn)


QUICK = {"sizes": (4 * 1000,), "rounds": 1, "seconds": 0.2, "least": 2, "most": 3, "transports": ("gloo",)}


def test_every_operation_is_measured_on_odd_numbers_of_ranks_and_bytes(on_workers):
    told = []
    settings = Settings(workers=3, ops=OPS, dtypes=("float32", "bfloat16"), **QUICK)
    ranks = on_workers(3, measure, settings, listen=lambda rank, event: told.append(event))
    assert figures.wrong(ranks) == []
    rows = figures.rows(cells(settings), ranks)
    assert [(row.op, row.dtype) for row in rows] == [
        (op, dtype) for op in OPS for dtype in ("float32", "bfloat16") if (op, dtype) != ("barrier", "bfloat16")
    ]
    assert all(0 < row.min_s <= row.latency_s and 2 <= row.iterations <= 3 and row.cpu_s > 0 for row in rows)
    assert [event["cell"] for event in told][:2] == ["all_reduce float32 4000 B", "all_reduce bfloat16 4000 B"]
    assert [event["done"] for event in told] == sorted(event["done"] for event in told)


def _measure_with_a_fault(group, settings, op, phase):
    real, calls = groups.native_call, [0]

    def planted(name, t, process_group):
        call = real(name, t, process_group)

        def once():
            call()
            calls[0] += 1
            if group.rank == 1 and name == op and phase(calls[0]):
                t.output[-1] += 1

        return once

    groups.native_call = planted
    return measure(group, settings)


FAULTS = {"the first call": lambda n: n == 1, "a repetition": lambda n: n == 5, "the last call": lambda n: n == 8}


@pytest.mark.parametrize("when", FAULTS)
def test_a_wrong_sum_is_seen_whenever_it_happens_and_the_rank_is_named(on_workers, when):
    settings = Settings(workers=2, ops=("all_reduce",), **{**QUICK, "least": 3, "most": 3})
    lines = figures.wrong(on_workers(2, _measure_with_a_fault, settings, "all_reduce", FAULTS[when]))
    assert "gloo, all_reduce float32 4000 B, rank 1: " in " ".join(lines)
    assert len(lines) == (2 if when == "a repetition" else 1), "a sum that goes on spreads"


def test_a_sweep_starts_its_own_ranks_and_tells_of_machine_and_settings(launches_here):
    result = sweep.sweep(Settings(workers=2, ops=("broadcast",), **QUICK))
    (row,) = result["rows"]
    assert row["algorithm_bytes_per_s"] == pytest.approx(4000 / row["latency_s"])
    assert result["wrong"] == []
    assert result["machine"]["cores"] >= 1
    assert result["settings"]["workers"] == 2


def test_sizes_beyond_the_memory_are_refused_before_anything_starts():
    with pytest.raises(UserError, match=r"ranks need 4096\.0 GiB for the largest size"):
        sweep.sweep(Settings(workers=2, **{**QUICK, "sizes": (1 << 39,)}))


def _command_under_torchrun(group, port, command):
    """What it prints, in the environment that torchrun gives."""
    from shoal.cli.main import main

    ranks = {"RANK": str(group.rank), "WORLD_SIZE": str(group.world), "LOCAL_RANK": str(group.rank)}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with redirect_stdout(io.StringIO()) as said:
        assert main(command) == 0
    return said.getvalue()


def test_under_torchrun_the_ranks_that_are_there_are_measured_and_one_speaks(on_workers, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["bench", "collectives", "--ops", "all_reduce,all_gather", "--sizes", "4KiB", "--transports", "gloo",
               "--seconds", "0.5", "--rounds", "1", "--json", "--plot", str(tmp_path / "plot.svg")]  # fmt: skip
    first, second = on_workers(2, _command_under_torchrun, port, command)
    assert {row["ranks"] for row in json.loads(first)["rows"]} == {2}
    assert second == ""
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")


def test_the_checkup_times_short_and_long_sums_over_what_is_there(launches_here, monkeypatch):
    monkeypatch.setenv("SHOAL_NATIVE", "0")
    found = checkup.checkup()
    assert found["trouble"] == ""
    assert set(found["all_reduce_s"]) == {"gloo", "shm-python"}, "nothing is compiled for it"
    assert all(0 < timed[size] < 10 for timed in found["all_reduce_s"].values() for size in checkup.SIZES)
    assert found["parts"]["backend"] == "SHOAL_NATIVE=0 is set"
    assert found["free_memory_bytes"] > 0


def test_without_dev_shm_there_is_none(tmp_path):
    free, all_of_it = checkup.dev_shm_bytes(tmp_path)
    assert 0 < free <= all_of_it
    assert checkup.dev_shm_bytes(tmp_path / "nothing") is None


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler to make shm with")
def test_shm_is_measured_beside_gloo_staged_and_on_its_heap_and_by_the_algorithms_over_it(on_workers):
    made = {**QUICK, "transports": ("gloo", "shm", "hier"), "zero_copy": True, "algorithms": ("native", "ring")}
    ops = ("all_reduce", "all_gather", "reduce_scatter", "send_recv", "barrier")
    settings = Settings(workers=3, ops=ops, **{**made, "sizes": (4000, 300_000)})
    ranks = on_workers(3, measure, settings)
    assert figures.wrong(ranks) == []
    rows = figures.rows(cells(settings), ranks)
    arms = {(row.transport, row.algorithm, row.zero_copy) for row in rows if row.op == "all_reduce"}
    assert arms == {(t, a, False) for t in made["transports"] for a in made["algorithms"]} | {
        ("shm", "native", True), ("hier", "native", True)
    }  # fmt: skip
    assert all((row.against is None) == (row is first) for row, first in _with_first_of_its_cell(rows))


def _with_first_of_its_cell(rows):
    first = {}
    return [(row, first.setdefault((row.op, row.bytes), row)) for row in rows]
