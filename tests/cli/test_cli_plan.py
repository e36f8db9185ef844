"""`shoal plan`: what is predicted is what the library predicts; what does not fit is one line."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from shoal.cli import plan as verb
from shoal.parallel.schedules import make_schedule
from shoal.parallel.schedules.csv_file import to_csv
from shoal.parallel.schedules.formulas import bubble, peak
from shoal.parallel.schedules.registry import MAKERS


def facts(shoal, *arguments):
    code, out, err = shoal("plan", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_a_plan_without_a_pipeline_says_who_has_which_shards(shoal):
    found = facts(shoal, "--mesh", "data=3")
    assert found["replicas"] == [
        {"ranks": [0], "shards": [0, 1, 2]},
        {"ranks": [1], "shards": [3, 4, 5]},
        {"ranks": [2], "shards": [6, 7]},
    ]
    assert "pipeline" not in found
    assert "data 3 (replicas of the model)" in shoal("plan", "--mesh", "data=3")[1]


def test_the_workers_of_a_replica_have_the_same_shards(shoal):
    found = facts(shoal, "--mesh", "pipe=2,data=2")
    assert found["replicas"] == [{"ranks": [0, 2], "shards": [0, 1, 2, 3]}, {"ranks": [1, 3], "shards": [4, 5, 6, 7]}]
    assert found["pipeline"]["micro_batches"] == 4


def test_a_pipeline_is_predicted_by_its_formula_and_drawn(shoal):
    found = facts(shoal, "--mesh", "pipe=4", "--micro-batches", "16")["pipeline"]
    assert found["bubble"] == pytest.approx(3 / 19)
    assert found["bubble_by_formula"] == pytest.approx(3 / 19)
    assert [worker["together"] for worker in found["activations"]] == [4, 3, 2, 1]
    assert found["messages"] == 2 * 3 * 16
    code, out, _ = shoal("plan", "--mesh", "pipe=2", "--micro-batches", "2")
    assert code == 0
    assert "worker 1  .....F1.0 B1.0----- F1.1 B1.1----- ....." in out
    assert "33.3% of the step (by formula 33.3%)" in out
    assert "measured are none of them" in out, "what times the figures rest on is said"


def test_all_schedules_stand_side_by_side(shoal):
    found = facts(shoal, "--mesh", "pipe=4", "--schedules", "all")["schedules"]
    assert [each["schedule"] for each in found] == list(MAKERS)
    for each in found:
        v = each["chunks"] // 4
        assert each["bubble"] == pytest.approx(bubble(each["schedule"], 4, 8, v))
        assert [p["together"] for p in each["activations"]] == [peak(each["schedule"], w, 4, 8, v) for w in range(4)]
    rows = shoal("plan", "--mesh", "pipe=4", "--schedules", "1f1b,zb-h1")[1]
    assert "1f1b" in rows
    assert "27.3%" in rows
    assert "gpipe" not in rows


def test_given_times_replace_the_unit_ones_and_no_formula_is_claimed_for_them(shoal):
    found = facts(
        shoal, "--mesh", "pipe=2", "--micro-batches", "1", "--times", "1,2,3/5,7,11", "--link-time", "0.5"
    )["pipeline"]  # fmt: skip
    assert found["span"] == 30.0
    assert found["bubble_by_formula"] is None


def test_sizes_of_activations_are_those_given(shoal):
    found = facts(
        shoal, "--mesh", "pipe=2", "--micro-batches", "4", "--schedules", "zb-h1", "--activations", "100,40"
    )["pipeline"]  # fmt: skip
    assert [worker["together"] for worker in found["activation_sizes"]] == [200, 140], "F0, then I0 kept beside F1"


def test_a_schedule_is_written_changed_by_nobody_and_read_again(shoal, tmp_path):
    one, two = tmp_path / "one.csv", tmp_path / "picture.svg"
    first = facts(shoal, "--mesh", "pipe=3", "--schedules", "zb-v", "--csv", str(one), "--svg", str(two))["pipeline"]
    assert one.read_text() == to_csv(make_schedule("zb-v", 3, 8))
    ElementTree.parse(two)
    again = facts(shoal, "--mesh", "pipe=3", "--set", f"pipeline.schedule={one}")["pipeline"]
    assert {**again, "schedule": "", "bubble_by_formula": 0} == {**first, "schedule": "", "bubble_by_formula": 0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--schedules", "1f1p"], "unknown schedule '1f1p' in plan.pipeline.schedule: did you mean '1f1b'?"),
        (["--set", "pipeline.schedule=gpip"], "did you mean 'gpipe'?"),
        (["--schedules", "none.csv"], "schedule 'none.csv' cannot be read"),
        (["--schedules", "deadlock.csv", "--micro-batches", "2"], "worker 1 at F1.1 waits for worker 0"),
        (["--schedules", "deadlock.csv"], "is for 2 micro-batches, and a replica's step has 8"),
        (["--schedules", "interleaved", "--set", "pipeline.chunks=9"], "18 chunks for a model of 4 layers"),
        (["--schedules", "all", "--svg", "x.svg"], "--svg is for one schedule, not for 9"),
        (["--svg", "nowhere/x.svg"], "cannot write 'nowhere/x.svg'"),
        (["--times", "1,2"], "--times '1,2': write 3 numbers above 0"),
        (["--times", "1,1,1/1,1,1/1,1,1"], "times are given for 3 chunks"),
        (["--micro-batches", "0"], "at least 1"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(arguments, says, shoal, tmp_path):
    (tmp_path / "deadlock.csv").write_text("F0.0,B0.0,F0.1,B0.1\nF1.0,F1.1,B1.0,B1.1\n")
    code, out, err = shoal("plan", "--mesh", "pipe=2", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_questions_about_a_pipeline_need_one(shoal):
    code, _, err = shoal("plan", "--mesh", "data=2", "--schedules", "all")
    assert code == 2
    assert "add an axis to the mesh, such as --mesh pipe=2" in err


def test_a_part_added_to_the_sections_is_said_and_is_in_the_json(shoal, monkeypatch):
    more = verb.Section({"more": 1}, "and more")
    monkeypatch.setattr(verb, "SECTIONS", (*verb.SECTIONS, lambda chosen, args: more))
    assert facts(shoal)["more"] == 1
    assert shoal("plan")[1].endswith("\n\nand more\n")


def test_a_pipeline_is_planned_without_torch():
    arguments = ["plan", "--mesh", "pipe=4", "--schedules", "all"]
    program = (
        f"import sys; from shoal.cli.main import main; assert main({arguments}) == 0; "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
