"""`shoal bench collectives`: parses, measures by one call, shows."""

import json
from pathlib import Path

import pytest

ROW = {
    "op": "all_reduce", "dtype": "float32", "bytes": 1024, "transport": "gloo", "algorithm": "native",
    "zero_copy": False, "ranks": 2, "iterations": 9, "latency_s": 1.5e-4, "min_s": 1e-4, "rounds_s": [1.5e-4],
    "algorithm_bytes_per_s": 2e9, "bus_bytes_per_s": 2e9, "memcpy_share": 0.25, "cpu_s": 3e-4, "against": None,
    "against_best": None, "against_cpu": None,
}  # fmt: skip
FASTER = {**ROW, "transport": "shm", "zero_copy": True, "latency_s": 3e-5, "against": 5.0, "against_best": 9.0,
          "against_cpu": 4.0, "memcpy_share": 1.25}  # fmt: skip
BARRIER = {**ROW, "op": "barrier", "bytes": 0, "algorithm_bytes_per_s": None, "bus_bytes_per_s": None,
           "memcpy_share": None, "algorithm": "binomial"}  # fmt: skip


@pytest.fixture
def sweeps(library, monkeypatch):
    """The settings of every sweep; ``wrong`` is what it finds wrong."""
    calls, wrong = [], []

    def sweep(settings, progress):
        calls.append(settings)
        progress({"event": "measuring", "cell": "all_reduce float32 1 KiB", "round": 1, "done": 0.5})
        machine = {"cores": 2, "load_average": 0.5, "processor": "P", "torch": "2"}
        made = {"workers": settings.workers, "transports": list(settings.transports)}
        return {"machine": machine, "settings": made, "rows": [ROW, FASTER, BARRIER], "wrong": wrong}

    library("shoal.comm.measuring.sweep", sweep=sweep)
    monkeypatch.setattr("shoal.comm.measuring.transports.missing", lambda name: "" if name != "nccl" else "no GPU")
    return calls, wrong


def test_the_table_has_a_line_an_arm_with_its_figures_and_what_they_are_times_of(sweeps, shoal):
    code, out, _ = shoal("bench", "collectives")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[1] == "all_reduce 1 KiB gloo 150 us 100 us 2.00 2.00 0.25 300 us"
    assert lines[2] == "all_reduce 1 KiB shm zero-copy 30 us 100 us 2.00 2.00 1.25 300 us 5.0x 9.0x 4.0x"
    assert lines[3].startswith("barrier - gloo binomial")
    assert "times as good as gloo" in out


def test_options_become_settings(sweeps, shoal):
    calls, _ = sweeps
    options = {"ops": "broadcast,barrier", "sizes": "1KiB..16KiB", "dtypes": "bfloat16,int8", "transports": "shm,gloo",
               "algorithms": "native,ring", "workers": "3", "rounds": "2", "seconds": "7"}  # fmt: skip
    shoal("bench", "collectives", "--zero-copy", *(f"--{name}={value}" for name, value in options.items()))
    made = calls[0]
    assert (made.ops, made.sizes, made.dtypes) == (("broadcast", "barrier"), (1024, 4096, 16384), ("bfloat16", "int8"))
    assert (made.transports, made.algorithms, made.zero_copy) == (("shm", "gloo"), ("native", "ring"), True)
    assert (made.workers, made.rounds, made.seconds) == (3, 2, 7.0)


def test_all_means_all(sweeps, shoal):
    calls, _ = sweeps
    shoal("bench", "collectives", "--ops", "all", "--dtypes", "all", "--algorithms", "all", "--transports", "all")
    assert {"send_recv", "barrier"} <= set(calls[0].ops)
    assert {"bfloat16", "int8"} <= set(calls[0].dtypes)
    assert {"native", "ring", "double_tree"} <= set(calls[0].algorithms)
    assert calls[0].transports == ("gloo", "shm", "hier")


def test_without_options_it_takes_what_this_machine_has_in_about_a_minute(sweeps, shoal, monkeypatch):
    calls, _ = sweeps
    monkeypatch.setattr("shoal.comm.measuring.transports.missing", lambda name: "" if name == "gloo" else "no compiler")
    assert shoal("bench", "collectives")[0] == 0
    assert calls[0].transports == ("gloo",)
    assert 2 <= calls[0].workers <= 4
    assert calls[0].seconds <= 60


def test_json_is_the_last_line_and_progress_goes_to_stderr(sweeps, shoal):
    code, out, err = shoal("bench", "collectives", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["rows"][1]["against"] == 5.0
    assert json.loads(err.splitlines()[0])["done"] == 0.5


def test_a_wrong_sum_is_a_failure(sweeps, shoal):
    _, wrong = sweeps
    wrong.append("shm, all_reduce float32 1 KiB, rank 1: wrong result before the repetitions")
    code, out, err = shoal("bench", "collectives")
    assert code == 1
    assert "all_reduce" in out, "the figures are shown all the same"
    assert err.splitlines()[-1].startswith("shoal: wrong result: shm, all_reduce float32 1 KiB, rank 1")
    assert shoal("bench", "collectives", "--json")[0] == 1


@pytest.mark.parametrize("suffix", ["html", "svg"])
def test_curves_are_drawn(sweeps, shoal, suffix):
    code, out, _ = shoal("bench", "collectives", "--plot", f"curves.{suffix}")
    assert code == 0
    assert out.endswith(f"wrote curves.{suffix}\n")
    text = Path(f"curves.{suffix}").read_text()
    assert "shm zero-copy" in text
    assert "1 KiB" in text
    assert not list(Path().glob(".curves*"))


def test_only_the_first_rank_of_torchrun_speaks(sweeps, shoal, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    code, out, _ = shoal("bench", "collectives", "--plot", "curves.svg")
    assert (code, out, Path("curves.svg").exists()) == (0, "", False)
    assert sweeps[0][0].workers == 2
    code, _, err = shoal("bench", "collectives", "--workers", "3")
    assert (code, "torchrun started 2" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: collectives|serve"),
        (["collective"], "unknown subject 'collective' in `shoal bench`: did you mean 'collectives'?"),
        (["collectives", "--op", "barrier"], "unknown option '--op' in `shoal bench`: did you mean '--ops'?"),
        (["collectives", "--ops", "allreduce"], "did you mean 'all_reduce'?"),
        (["collectives", "--ops", ","], "at least one operation"),
        (["collectives", "--dtypes", "bf16"], "unknown dtype 'bf16': did you mean"),
        (["collectives", "--algorithms", "rings"], "did you mean 'ring'?"),
        (["collectives", "--transports", "shmem"], "did you mean 'shm'?"),
        (["collectives", "--transports", "nccl"], "'nccl' is not to be had: no GPU."),
        (["collectives", "--transports", "gloo", "--zero-copy"], "--zero-copy needs a transport"),
        (["collectives", "--sizes", "big"], "'big' is no size: write such as 64KiB"),
        (["collectives", "--workers", "1"], "--workers must be 2 to 40, got 1"),
        (["collectives", "--rounds", "0"], "--rounds must be at least 1"),
        (["collectives", "--seconds", "soon"], "invalid float value: 'soon'"),
        (["collectives", "--plot", "curves.png"], "name a file that ends in .html or .svg"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_measured(sweeps, shoal, arguments, message):
    code, out, err = shoal("bench", *arguments)
    assert (code, out, sweeps[0]) == (2, "", [])
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_plot_that_cannot_be_written_is_told(sweeps, shoal):
    code, _, err = shoal("bench", "collectives", "--plot", "no/such/folder/curves.svg")
    assert code == 2
    assert "cannot write the plot 'no/such/folder/curves.svg'" in err
