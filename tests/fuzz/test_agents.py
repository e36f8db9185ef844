"""What somebody who is no agent of ours, or one that has gone wrong, may say to an agent: refused in one line.

Numbers that are none, or are too large, are planted in each number of each message."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from elastic.test_links import MESSAGES
from hypothesis import given
from hypothesis import strategies as st

from shoal.elastic import frames
from shoal.elastic.links import _read_hello

HUGE = "1" * 400
NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", HUGE, f"-{HUGE}", "1" * 5000, str(1 << 63)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(list(frames.KINDS)),
    lambda inner: st.lists(inner, max_size=9),
    max_leaves=30,
)


def numbers_of(message: Any) -> Iterator[tuple[list[Any], int]]:
    """The place of each number in a message, as the list that holds it and where in it."""
    for place, item in enumerate(message):
        if isinstance(item, list):
            yield from numbers_of(item)
        elif type(item) in (int, float):
            yield message, place


@pytest.mark.parametrize("planted", NO_NUMBERS, ids=lambda text: text[:12])
def test_a_number_that_is_none_or_too_large_is_refused_wherever_it_stands(planted):
    count = 0
    for message in map(frames.plain, MESSAGES):
        for row, place in numbers_of(message):
            before, row[place] = row[place], "PLANTED"
            raw = json.dumps(message).replace('"PLANTED"', planted)
            row[place] = before
            count += 1
            with pytest.raises(frames.FrameError) as refused:
                frames.decode(raw.encode())
            assert "\n" not in str(refused.value)
            assert len(str(refused.value)) < 200
    assert count > 25


@given(value=JSON, kind=st.sampled_from(list(frames.KINDS)))
def test_whatever_is_no_message_is_refused_and_does_nothing_else(value, kind):
    for raw in (
        json.dumps(value),
        json.dumps([kind, value]),
        json.dumps([kind, *(value if isinstance(value, list) else [])]),
    ):
        try:
            found = frames.decode(raw.encode())
        except frames.FrameError:
            continue
        assert type(found).__name__ in frames.KINDS
        assert frames.decode(frames.encode(found)) == found, "what was taken can be said again"


@given(value=JSON)
def test_a_greeting_that_no_agent_sends_ends_the_connection_and_no_more(value):
    for raw in (json.dumps(value), json.dumps([1, 2, "job", value]), f"[{HUGE}, {json.dumps(value)}", "\xff"):
        try:
            origin, to, job, pair = _read_hello(raw.encode("latin-1", "replace"))
        except EOFError:
            continue
        assert (type(job), len(pair) in (0, 3)) == (str, True)
        assert all(isinstance(number, int) for number in (origin, to, *pair))
