"""What a report says about a budget."""

from shoal.observe.memory_section import read_memory, section

MIB = 1 << 20
PARTS = {"weights": 10, "gradients": 10, "optimizer": 20, "checkpoint": 0, "data": 0, "activations": 50, "update": 0}


def log(*peaks: list[int], budget: int = 100) -> list[dict]:
    predicted = [{k: v * MIB for k, v in {**PARTS, "peak": 90}.items()} for _ in range(2)]
    memory = {"budget": budget * MIB, "ways": [{"full": 2, "plain": 1}] * 2, "predicted": predicted, "exact": True}
    steps = [
        {"event": "committed", "step": n, "memory": {"peaks": [p * MIB for p in each]}} for n, each in enumerate(peaks)
    ]
    return [{"event": "started", "memory": memory}, {"event": "committed", "step": 0}, *steps]


def test_the_most_of_each_rank_stands_beside_what_was_predicted():
    told = read_memory(log([80, 70], [85, 60]))
    assert told is not None
    assert told.observed == (85 * MIB, 70 * MIB)
    page = section([("run", told)])
    assert "The budget of 100 MiB was kept: a worker took 85 MiB at most, 90 MiB were predicted." in page
    assert "Of 3 blocks 2 are computed again in full; 1 keep all." in page
    assert "checkpoint" not in page
    assert page.count("<td") == 2 * 6


def test_a_budget_that_was_broken_is_said_to_be():
    events = log([80, 70], [105, 60])
    events[-1]["memory"]["ways"] = [{"full": 3}] * 2
    page = section([("run", read_memory(events))])
    assert "was not kept: a worker took 105 MiB" in page
    assert "Of 3 blocks 3 are computed again in full" in page


def test_what_each_stage_of_a_pipeline_chose_stands_beside_it():
    events = log([80, 70])
    events[0]["memory"]["ways"] = [{"full": 1}, {"plain": 1}]
    page = section([("run", read_memory(events))])
    assert "<td>1 are computed again in full</td>" in page
    assert "<td>1 keep all</td>" in page
    assert "Of 1 blocks" not in page


def test_a_run_without_a_budget_has_no_such_section():
    assert read_memory([{"event": "started"}, {"event": "committed", "step": 1}]) is None
    assert section([("run", None)]) == ""


def test_a_log_of_somebody_else_does_no_harm():
    assert read_memory([{"event": "started", "memory": {"budget": "much", "predicted": 3}}]) is None
    events = log()
    events.append({"event": "committed", "step": 1, "memory": {"peaks": "none"}})
    assert "No step has told yet" in section([("run", read_memory(events))])
