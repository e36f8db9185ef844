"""What is shown while a run goes on."""

import io
import json
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_run import STARTED, committed
from rich.console import Console

from shoal.cli.output import count, duration, json_line, table
from shoal.cli.progress import JsonLines, LiveLine, PlainLines, Silence, display, pace, remark


def test_the_pace_is_that_of_the_last_steps():
    recent = deque([committed(9, seconds=1.5), committed(10, seconds=0.5)])
    now = pace(recent, 20)
    assert (now.step, now.total, now.loss, now.unit) == (10, 20, 1.0, "tokens")
    assert now.rate == 2 * 32 * 128 / 2.0
    assert now.eta_s == 10.0
    assert now.waiting == pytest.approx(0.1 / 2.0)  # of the rank that waited longest
    assert now.line() == "step 10/20  loss 1.0000  4096 tokens/s  0:10 left  data wait 5%"


def test_without_a_known_length_there_is_no_eta_and_samples_with_one_target_are_samples():
    now = pace(deque([committed(3, targets=32, waited={})]), 0)
    assert now.line() == "step 3  loss 1.7000  64 samples/s  data wait 0%"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9), st.floats(0, 100))
def test_the_share_of_waiting_is_a_share(seconds, waited):
    now = pace(deque(committed(1, seconds=each, waited={"0": waited}) for each in seconds), 1)
    assert 0 <= now.waiting <= 1


def test_a_loss_that_was_written_as_text_is_shown():
    assert "loss nan" in pace(deque([committed(1, loss="nan")]), 2).line()


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            {"event": "evaluated", "step": 8, "split": "validation", "figures": {"loss": 1.23456}},
            "step 8  validation: loss 1.235",
        ),
        ({"event": "interrupted", "step": 8, "why": "Ctrl-C"}, "interrupted at step 8: Ctrl-C"),
        ({"event": "failed", "step": 8, "why": "NaN"}, None),
        (
            {"event": "resumed", "step": 8, "checkpoint": "step-8", "skipped": [{"path": "step-9", "why": "torn"}]},
            "resumed from step-8 at step 8; left out step-9: torn",
        ),
        ({"event": "checkpointed", "step": 8}, None),
        (
            {
                "event": "proved",
                "number": 3,
                "of": 9,
                "model": "gpt",
                "plan": "pipe=2",
                "ok": True,
                "error": 0.0,
                "seconds": 2.34,
            },
            "3/9  gpt: pipe=2  error 0  2.3 s",
        ),
        (
            {"event": "proved", "number": 1, "of": 1, "plan": "tensor=2", "ok": False, "error": 0.5, "seconds": 2.0},
            "1/1  tensor=2  DIFFERS  2.0 s",
        ),
        ({**STARTED, "workers": 1, "placement": [8]}, "1.8M parameters, 1 worker of 8 shards on cpu, float32"),
    ],
)
def test_other_events_have_a_line_where_a_person_wants_one(event, line):
    assert remark(event) == line


def test_plain_lines_come_every_few_seconds_and_at_the_last_step():
    out, now = io.StringIO(), 0.0
    with PlainLines(out, clock=lambda: now) as show:
        show(STARTED)
        for step, now in ((1, 0.0), (2, 4.9), (3, 5.0), (4, 5.1)):  # noqa: B007 - the clock reads it
            show(committed(step))
    assert [line[:8] for line in out.getvalue().splitlines()[1:]] == ["step 1/4", "step 3/4", "step 4/4"]


def test_the_live_line_is_drawn_in_place_and_remarks_stay_above_it():
    out, now = io.StringIO(), 0.0
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with LiveLine(console, clock=lambda: now) as show:
        show(STARTED)
        for step, now in ((1, 1.0), (2, 1.01), (4, 1.02)):  # noqa: B007 - the clock reads it
            show(committed(step))
        show({"event": "checkpointed", "step": 4})
        show({"event": "evaluated", "step": 4, "split": "validation", "figures": {"loss": 1.0}})
    text = out.getvalue()
    assert "1.8M parameters" in text
    assert "step 1/4" in text
    assert "step 2/4" not in text, "drawn more often than an eye can follow"
    assert "step 4/4" in text
    assert "step 4  validation: loss 1" in text
    assert "\x1b[2K" in text


def test_the_display_fits_where_the_output_goes(capsys, monkeypatch):
    assert isinstance(display(json=False), PlainLines)
    assert isinstance(display(json=True, speaks=False), Silence)
    with display(json=True) as show:
        show({"event": "failed", "step": 1, "loss": float("inf")})
    assert isinstance(show, JsonLines)
    assert json.loads(capsys.readouterr().err) == {"event": "failed", "step": 1, "loss": "inf"}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(display(json=False), LiveLine)


def test_numbers_and_tables_are_short():
    assert [count(n) for n in (3.14159, 42, 640, 9999, 12_345, 1_800_000, 2e9)] == [
        "3.14",
        "42",
        "640",
        "9999",
        "12.3k",
        "1.8M",
        "2.0G",
    ]
    assert [duration(s) for s in (0.4, 75.2, 3700)] == ["0:00", "1:15", "1:01:40"]
    assert table(("a", "b"), [("long", 1), ("x", "")]) == "a     b\nlong  1\nx"
    assert json_line({"t": (1, float("nan"))}) == '{"t": [1, "nan"]}'
