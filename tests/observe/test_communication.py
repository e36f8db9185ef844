"""The section on communication: read from logs of any state, drawn whole, and the same facts in text and as a trace."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logbook import committed, make_run, started, story
from made_up_traffic import MB, comm, run, sample

from shoal.errors import UserError
from shoal.observe import trace
from shoal.observe.communication import read_communication
from shoal.observe.communication_facts import facts, lines
from shoal.observe.report import write

SLOW_LINK = {"compute": (0.05, 0.05), "transferring": 0.04, "hidden": 0.02, "latency_s": 0.0}


def with_samples(events):
    return [
        {**event, "comm": {**event["comm"], "sample": sample(event["comm"]["step"])}} if "comm" in event else event
        for event in events
    ]


def section(page):
    found = re.search(r'<section id="communication">.*?</section>', page.read_text(encoding="utf-8"), re.DOTALL)
    return found[0] if found else ""


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("events", [[], [started()], story(), [started(workers=1), committed(1), committed(2)]])
def test_a_log_that_says_nothing_of_communication_makes_a_report_without_it(tmp_path, events):
    assert read_communication(events) is None
    assert section(write([make_run(tmp_path / "old", events)])) == ""


def test_figures_are_means_over_steps_and_the_first_few_are_left_out():
    events = run(steps=12, **SLOW_LINK)
    for event in events:
        if event.get("comm", {}).get("step", 9) <= 2:  # the steps that allocate and compile
            event["comm"] = comm(event["comm"]["step"], transferring=9.0)
    c = read_communication(events)
    assert c.exposed_s == pytest.approx(0.04)
    assert c.hidden_s == pytest.approx(0.02)
    assert c.sent_bytes == pytest.approx(40 * MB)
    assert c.step_s == pytest.approx(0.1)


def test_fields_that_tell_of_several_steps_count_as_several():
    one, ten = comm(5, transferring=0.01), comm(15, transferring=0.21)
    ten["steps"] = 10
    for name, values in ten["phases"].items():
        ten["phases"][name] = [10 * value for value in values]
    events = [started(), committed(6, comm=one), committed(16, comm=ten)]
    c = read_communication(events)
    assert c.steps == 11
    assert c.exposed_s == pytest.approx((0.01 + 0.21) / 11)
    assert sum(c.compute) / 2 == pytest.approx(0.08)


def test_a_resumed_run_is_told_by_its_last_session():
    before = run(steps=6, transferring=0.5)
    resumed = {"time": 7.0, "event": "resumed", "step": 3, "checkpoint": "", "skipped": []}
    after = run(steps=9, placement=(3, 3, 2), compute=(0.05,) * 3, loading=(0.0,) * 3, updating=(0.0,) * 3,
                waits=((0.0,) * 3,) * 3, transferring=0.01)  # fmt: skip
    c = read_communication([*before, resumed, *after])
    assert c.workers == 3
    assert c.exposed_s == pytest.approx(0.01)


def split(events, mesh, bottom="stage receive"):
    """The same log of a split model, whose passes wait for messages."""
    for event in events:
        if event["event"] == "started":
            event["split"] = {"mesh": mesh, "exact": True}
        for row in event.get("comm", {}).get("operations", []):
            row["operation"] = bottom
    return events


def test_a_pipeline_names_the_stages_that_wait_and_predicts_nothing_of_gradients(tmp_path):
    turns = ((0.0, 0.02), (0.02, 0.0))
    log = make_run(tmp_path / "pipe", split(run(steps=8, waits=turns, compute=(0.05, 0.05)), {"pipe": 2}))
    c = read_communication(log.events())
    found = facts(c)
    assert (found["remedies"], found["ways"]) == ([], [])
    assert found["bottleneck"]["kind"] == "stages"
    assert len(lines(c)) == 1
    text = section(write([log]))
    assert "stage receive" in text
    assert "Who waits for whom" in text
    assert "What would help" not in text
    assert "parameter servers" not in text
    assert "pipe 2" in section(write([log, make_run(tmp_path / "whole", run(steps=8))]))


def test_seconds_that_slices_send_within_their_passes_are_not_computing():
    events = split(run(steps=8, compute=(0.08, 0.08), transferring=0.02), {"tensor": 2}, "all-reduce (tensor)")
    c = read_communication(events)
    assert c.compute == pytest.approx((0.06, 0.06))
    assert c.operations == 0  # none with gradients
    assert "all-reduce (tensor) over tcp" in facts(c)["bottleneck"]["sentence"]


ANY = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["step", "waits", "phases"]), inner),
    max_leaves=6,
)


@given(st.sampled_from(["waits", "phases", "operations", "steps", "step", "sample"]), ANY)
def test_fields_that_make_no_sense_cost_the_section_and_not_the_report(key, nonsense):
    events = run(steps=6)
    for event in events:
        if "comm" in event:
            event["comm"] = {**event["comm"], key: nonsense}
    c = read_communication(events)
    assert c is None or c.workers == 2


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_section_tells_the_finding_first_and_then_what_it_rests_on(tmp_path):
    text = section(write([make_run(tmp_path / "run", with_samples(run(**SLOW_LINK)))]))
    titles = ['<p class="finding notable"', "What would help", "Operations", "Who waits", "One step, bucket by bucket"]
    places = [text.find(title) for title in titles if title != "Who waits"]
    assert -1 not in places
    assert places == sorted(places)
    assert 'data-bottleneck="bandwidth"' in text
    assert "Who waits" not in text, "nobody waited"


def test_waits_are_a_matrix_and_of_many_workers_the_longest_pairs(tmp_path):
    for workers, shown in ((3, 9), (20, 0)):
        waits = [[0.01 * (peer == 1 != rank) for peer in range(workers)] for rank in range(workers)]
        each = {"placement": (1,) * workers, "loading": (0.0,) * workers, "updating": (0.0,) * workers}
        events = run(**each, compute=(0.05,) * workers, waits=waits)
        text = section(write([make_run(tmp_path / str(workers), events)]))
        cells = re.findall(r'data-seconds="([^"]*)"', text)
        assert len(cells) == (shown - workers if shown else 0)
        assert (">for rank 1<" in text) == (not shown)
        assert "Who waits for whom" in text


def test_every_bucket_of_the_sampled_step_is_drawn(tmp_path):
    text = section(write([make_run(tmp_path / "run", with_samples(run(**SLOW_LINK)))]))
    drawn = re.findall(r"<title>bucket (\d+): (waits for another worker|on its way|reduced): ([\d.]+ ms)</title>", text)
    assert drawn.count(("1", "reduced", "2.00 ms")) == 2
    assert drawn.count(("1", "waits for another worker", "1.00 ms")) == 1  # of rank 0; rank 1 is the last
    assert {bucket for bucket, *_ in drawn} == {"0", "1", "2"}


def test_two_ways_are_compared_predicted_and_measured(tmp_path):
    reduced = make_run(tmp_path / "reduced", run(**SLOW_LINK))
    waits = [[0.0, 0.0, 0.02], [0.0, 0.0, 0.02]]
    served = run(seconds=0.16, operation="push", waits=waits, **{**SLOW_LINK, "transferring": 0.08})
    text = section(write([reduced, make_run(tmp_path / "served", served)]))
    assert re.findall(r'<tr data-run="([^"]*)">', text) == ["reduced", "served"]
    assert "1 parameter server, tcp" in text
    row = re.search(r'<tr data-way="1 parameter server">.*?</tr>', text)[0]
    assert "100 ms of 160 ms in served" in row


def test_text_of_the_log_is_never_markup_in_the_section(tmp_path):
    planted = "<img src=x onerror=alert(1)>"
    events = run(operation=planted, link=planted, **SLOW_LINK)
    text = section(write([make_run(tmp_path / "run", events)]))
    assert "<img" not in text
    assert "&lt;img" in text


# --- text and trace -------------------------------------------------------------------------------------------------


def test_text_and_page_say_the_same():
    c = read_communication(run(**SLOW_LINK))
    told = facts(c)
    assert json.loads(json.dumps(told)) is not None
    assert told["bottleneck"]["kind"] == "bandwidth"
    assert lines(c)[0] == told["bottleneck"]["sentence"]
    best = told["remedies"][0]
    assert lines(c)[1].startswith(f"would help: {best['name']} ({best['how']})")
    assert told["exposed_s"] == pytest.approx(0.04)
    assert told["ways"][0]["name"] == "all-reduce (direct)"


def test_a_trace_holds_compute_and_buckets_of_every_worker(tmp_path):
    events = with_samples(run(**SLOW_LINK))
    folder = make_run(tmp_path / "run", events)
    written = json.loads(trace.write(folder, tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in written if event["name"] == "process_name"}
    assert names == {"rank 0", "rank 1"}
    rows = {event["args"]["name"] for event in written if event["name"] == "thread_name"}
    assert rows == {"step", "compute", "bucket 0", "bucket 1", "bucket 2"}
    spans = [event for event in written if event["ph"] == "X"]
    assert sum(event["name"] == "backward" for event in spans) == 2 * sum("comm" in event for event in events)
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in spans)


def test_a_run_without_sampled_steps_has_no_trace_and_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no sampled step"):
        trace.write(make_run(tmp_path / "run", story()), tmp_path / "trace.json")
    with pytest.raises(UserError, match="cannot write the trace"):
        trace.write(make_run(tmp_path / "other", with_samples(run())), tmp_path / "no" / "trace.json")
