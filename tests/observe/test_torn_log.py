"""The event log after a kill in the middle of a line."""

import json

import pytest

from shoal.run.events import EventLog, read_events


def written(path, *events):
    log = EventLog(path)
    for event in events:
        log.write(event, step=1)
    log.close()


def test_a_log_goes_on_after_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, "one", "two")
    path.write_bytes(path.read_bytes()[:-10])
    assert [event["event"] for event in read_events(path)] == ["one"]
    written(path, "three", "four")
    assert [event["event"] for event in read_events(path)] == ["one", "three", "four"]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_wherever_a_line_was_torn_the_next_ones_are_whole(tmp_path, cut):
    path = tmp_path / "events.jsonl"
    written(path, "one")
    path.write_bytes(path.read_bytes()[:cut])
    written(path, "two")
    assert [event["event"] for event in read_events(path)] == ["two"]


def test_a_whole_log_has_no_blank_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, "one")
    written(path, "two")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["one", "two"]


def test_a_line_that_did_not_fit_is_an_error_and_is_written_before_the_next_one(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    import os

    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, line: whole(file, line[:7]))
    with pytest.raises(OSError, match="only 7 of"):
        log.write("one")
    monkeypatch.undo()
    log.write("two")
    log.close()
    assert [event["event"] for event in read_events(path)] == ["one", "two"]


def test_not_a_number_is_written_as_text(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("committed", loss=float("nan"), parts={"data": float("inf")})
    log.close()
    (event,) = read_events(path)
    assert (event["loss"], event["parts"]) == ("nan", {"data": "inf"})


def test_a_log_that_is_not_there_has_no_events(tmp_path):
    assert list(read_events(tmp_path / "none.jsonl")) == []
