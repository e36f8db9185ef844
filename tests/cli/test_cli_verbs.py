"""The other verbs: each one call of the library."""

import json
import tomllib
from pathlib import Path

import pytest
from made_up_run import committed

from shoal.cli.doctor import EXTRAS, communication
from shoal.comm.measuring.checkup import SIZES
from shoal.recipe.layers import assemble
from shoal.recipe.plan import Plan
from shoal.run.run import Run


@pytest.fixture
def runs():
    recipe, origins = assemble(None, "gpt-stdlib")
    return [Run.create(recipe, Plan(), origins, Path(name)) for name in ("one", "two")]


def test_eval_prints_the_figures(library, shoal):
    calls = []

    def evaluate(target, **given):
        calls.append((target, given))
        return {"split": "test", "samples": 9, "figures": {"loss": 1.5, "accuracy": 0.75}}

    library("shoal.train.api", evaluate=evaluate)
    code, out, _ = shoal("eval", "latest")
    assert code == 0
    assert out.split() == ["figure", "value", "split", "test", "samples", "9", "loss", "1.5", "accuracy", "0.75"]
    assert calls[0][0] == "latest"
    assert "split" not in calls[0][1], "the library chooses the split where nobody did"
    _, out, _ = shoal("eval", "latest", "--split", "validation", "--json")
    assert json.loads(out)["figures"]["accuracy"] == 0.75
    assert calls[1][1]["split"] == "validation"


def test_report_writes_a_page_about_one_run_or_several(library, shoal, runs):
    calls = []

    def write(runs, output):
        calls.append((runs, output))
        return Path("page.html")

    library("shoal.observe.report", write=write)
    assert shoal("report", "one") == (0, "wrote page.html\n", "")
    assert calls[0] == ([runs[0]], None)
    _, out, _ = shoal("report", "one", "--compare", "two", "--output", "x.html", "--json")
    assert calls[1] == (runs, Path("x.html"))
    told = {"report": "page.html", "runs": [str(run.path) for run in runs], "communication": [None, None]}
    told["pipeline"] = [None, None]
    assert json.loads(out) == told
    assert json.loads(shoal("report", "one", "two", "--json")[1]) == told
    assert calls[2] == (runs, None)


def test_export_writes_a_folder(library, shoal):
    library("shoal.train.api", export=lambda target, folder: folder / target)
    assert shoal("export", "latest", "out") == (0, "wrote out/latest\n", "")
    assert json.loads(shoal("export", "latest", "out", "--json")[1]) == {"folder": "out/latest"}


def proved(*plans):
    return {
        "plans": [
            {"plan": name, "ok": not where, "error": 0.5 if where else 0.0, "differs": where} for name, where in plans
        ]
    }


@pytest.fixture
def proofs(library):
    calls = []

    def prove(recipe, *, workers, steps, progress):
        calls.append((recipe, workers, steps))
        progress(committed(1))
        return proved(*((f"data={count}", None) for count in workers))

    library("shoal.prove.api", prove=prove)
    return calls


def test_prove_compares_the_plans_and_exits_0_when_all_agree(proofs, shoal):
    code, out, _ = shoal("prove", "--workers", "1,3")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[-2:]] == [["data=1", "same"], ["data=3", "same"]]
    assert proofs == [(assemble(None, "gpt-stdlib")[0], (1, 3), 20)]


@pytest.mark.parametrize(
    ("arguments", "workers"),
    [
        ([], (1, 2, 4)),
        (["--shards", "2"], (1, 2)),
    ],
)
def test_prove_takes_the_worker_counts_that_the_shards_allow(arguments, workers, proofs, shoal):
    shoal("prove", *arguments, "--steps", "5")
    assert proofs[0][1:] == (workers, 5)


def test_prove_exits_1_and_names_the_first_step_and_tensor_that_differ(library, shoal):
    where = {"step": 7, "tensor": "model/head.weight"}
    library("shoal.prove.api", prove=lambda recipe, **given: proved(("data=1", None), ("data=2", where)))
    code, out, _ = shoal("prove")
    assert code == 1
    assert "DIFFERS" in out
    assert "step 7, model/head.weight" in out
    code, out, _ = shoal("prove", "--json")
    assert code == 1
    assert json.loads(out)["plans"][1]["differs"] == where


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "1,9"], "9 workers for 8 shards"),
        (["--workers", "0"], "at least 1 worker"),
        (["--workers", "two"], "--workers 'two': write whole numbers"),
        (["--workers", "1", "--plans", "standard"], "not allowed with argument"),
        (["--models", "gpt"], "give --plans standard"),
    ],
)
def test_prove_refuses_counts_that_cannot_run(arguments, message, proofs, shoal):
    code, _, err = shoal("prove", *arguments)
    assert (code, proofs) == (2, [])
    assert message in err


CHECKUP = {
    "parts": {"kernels": "ready", "allocator": "ready", "backend": "ready"},
    "all_reduce_s": {"gloo": {65536: 1.5e-4}, "shm-python": {65536: 1e-4}, "shm": {65536: 3e-5}},
    "trouble": "", "free_memory_bytes": 2 << 30, "dev_shm_bytes": (1 << 26, 1 << 27), "ranks_with_a_core": 3,
}  # fmt: skip


def test_doctor_tells_what_this_machine_has(shoal, library, monkeypatch):
    library("shoal.comm.measuring.checkup", checkup=lambda: CHECKUP)
    monkeypatch.setattr("shoal.cli.doctor.TRIALS", 1)
    monkeypatch.setattr("shoal.cli.doctor.SIZE", 32)
    monkeypatch.setattr(
        "shoal.cli.doctor.EXTRAS", {"nothing": (("json", "no_such_module"), "no files"), "json": (("json",), "")}
    )
    code, out, _ = shoal("doctor")
    assert code == 0
    assert "usable" in out
    assert "missing, for no files: pip install 'shoal[nothing]'" in out
    found = json.loads(shoal("doctor", "--json")[1])
    assert found["cores"] >= 1
    assert found["bfloat16_speedup"] > 0
    assert found["extras"] == {"nothing": False, "json": True}
    assert found["communication"]["all_reduce_s"]["shm"] == {"65536": 3e-5}


def test_doctor_knows_every_extra():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(declared["optional-dependencies"]) - {"dev"}


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({}, ["compiled parts: ready",
              "all-reduce, 2 ranks: 64 KiB gloo 150 us, shm-python 100 us (1.5x), shm 30 us (5.0x)",
              "shared memory: 2.0 GiB free; /dev/shm 0.1 GiB of 0.1 GiB free", "ranks: 3 have a core each"]),
        ({"parts": {"kernels": "ready", "allocator": "no c++", "backend": "no c++"}, "dev_shm_bytes": None,
          "all_reduce_s": {"gloo": {65536: 1.5e-4}, "shm-python": {65536: 1e-4}}},
         ["compiled parts: allocator, backend missing: no c++; shm goes over shared memory in Python",
          "all-reduce, 2 ranks: 64 KiB gloo 150 us, shm-python 100 us (1.5x); compiled, shm would",
          "2.0 GiB free; no /dev/shm"]),
        ({"parts": {"kernels": "ready", "allocator": "ready", "backend": "on first use"}},
         ["compiled parts: backend compiled on first use; `python -m shoal.comm.native` does it now"]),
        ({"trouble": "rank 1 died", "all_reduce_s": {"gloo": {}}}, ["all-reduce, 2 ranks: rank 1 died"]),
    ],
)  # fmt: skip
def test_doctor_tells_what_ranks_talk_by_and_what_is_missing(changed, lines):
    said = "\n".join(f"{what}: {found}" for what, found in communication({**CHECKUP, **changed}))
    for line in lines:
        assert line in said


def test_what_doctor_says_of_a_missing_backend_stands_in_the_figures():
    """Where shm is not there, doctor says that it would take less than half of gloo's time."""
    rows = json.loads((Path(__file__).parents[2] / "bench/results/collectives.json").read_text())["rows"]
    staged = [row for row in rows if row["transport"] == "shm" and not row["zero_copy"] and row["op"] == "all_reduce"]
    assert {row["bytes"] for row in staged} >= set(SIZES)
    assert all(row["against"] > 2 for row in staged)
