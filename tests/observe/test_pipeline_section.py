"""What a report says about stages."""

import pytest

from shoal.observe.pipeline_section import against_off, facts, lines, read_pipeline, section

SIZES = 2, 1  # micro-batches of a shard, chunks of a stage


def log(schedule="1f1b", seconds=1.0, stages=((0.6, 0.2, 0.8, 2), (0.5, 0.5, 1.0, 1)), steps=6):
    split = {"mesh": {"data": 2, "pipe": 2}, "exact": True, "schedule": schedule, "placement": [0, 1], "cuts": ["a"]}
    slow = [[9.0, 9.0, 18.0, 9]] * len(stages)  # the first steps do not count
    return [
        {"event": "started", "step": 0, "placement": [3, 5], "split": split},
        *(
            {
                "event": "committed",
                "step": n,
                "seconds": 50.0 if n <= 3 else seconds,
                "stages": slow if n <= 3 else [list(stage) for stage in stages],
            }
            for n in range(1, steps + 1)
        ),
    ]


def test_what_was_measured_stands_beside_the_formula():
    told = read_pipeline(log(), *SIZES)
    found = facts(told)
    m, p = 5 * 2, 2  # of the replica with the most shards
    assert found["still_by_formula"] == pytest.approx((p - 1) / (m + p - 1))
    assert found["gain_by_formula"] == pytest.approx(p * m / (m + p - 1))
    assert found["still"] == pytest.approx(1 - (0.6 + 0.5) / 2)
    assert found["gain"] == pytest.approx(1.1)
    assert found["step_s"] == 1.0
    assert [stage["waiting_s"] for stage in found["stages"]] == pytest.approx([0.2, 0.5])
    foreseen, measured = lines(told)
    assert "10 micro-batches" in foreseen
    assert "9.1 %" in foreseen
    assert "1.82 times the speed of one worker and 1.82 times the speed of schedule off" in foreseen
    assert "stood still 45.0 %, 1.10 times the speed of one worker" in measured
    page = section([("run", told)])
    assert page.count("<td") == 2 * 4
    assert "25.0 %" in page


def test_runs_side_by_side_say_what_pipelining_gained():
    named = [("fast", read_pipeline(log(), *SIZES)), ("slow", read_pipeline(log("off", 1.5), *SIZES))]
    (said,) = against_off(named)
    assert said.startswith("fast: pipelining (1f1b) made a step 1.50 times as fast as schedule off did")
    assert said.split(" made ")[1] in section(named).replace("&#x27;", "'")
    assert against_off(named[:1]) == []


def test_a_schedule_from_a_file_has_no_formula_and_a_run_without_stages_no_section():
    told = read_pipeline(log("mine.csv"), *SIZES)
    assert facts(told)["still_by_formula"] is None
    assert len(lines(told)) == 1
    assert read_pipeline([{"event": "started", "step": 0, "placement": [8]}], *SIZES) is None
    assert section([("run", None)]) == ""


def test_a_log_of_somebody_else_does_no_harm():
    events = log()
    events[5]["stages"], events[6]["stages"] = "none", [[1.0, "x", 2.0, 1]]
    assert facts(read_pipeline(events, *SIZES))["still"] == pytest.approx(0.45)
    events[4]["stages"] = None
    assert facts(read_pipeline(events, *SIZES))["still"] is None
    events[0]["split"] = {"schedule": "of tomorrow", "mesh": {"pipe": "two"}}
    assert read_pipeline(events, *SIZES) is None
