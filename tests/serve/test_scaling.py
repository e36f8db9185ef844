"""The scaler: up at once, down after calm, never outside of its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.scaling import Bounds, Scaler

LOOKS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 40)), min_size=1, max_size=40)


@given(LOOKS, st.integers(0, 2), st.integers(2, 5), st.integers(1, 8), st.integers(0, 300))
def test_what_is_wanted_is_the_most_that_was_needed_of_late(steps, least, most, each, calm):
    """Against a plain reckoning: a need holds from one look to the next; times are whole numbers, so exact."""
    scaler, now = Scaler(Bounds(least=least, most=most, each=each, calm_s=calm), most, 0), 0
    held = [(0, most)]  # (since, need)
    for gap, count in steps:
        now += gap
        need = min(most, max(least, -(-count // each)))
        held.append((now, need))
        ends = [since for since, _ in held[1:]]
        expected = max([need, *(old for (_, old), end in zip(held[:-1], ends, strict=True) if end > now - calm)])
        assert scaler.look(count, now) == expected
        assert least <= scaler.wanted <= most


@given(LOOKS)
def test_it_says_when_to_look_again_until_it_wants_no_fewer(steps):
    scaler, now = Scaler(Bounds(least=0, most=4, each=4, calm_s=50), 1, 0), 0
    for gap, count in steps:
        now += gap
        scaler.look(count, now)
    scaler.look(0, now)
    while (at := scaler.next_at()) is not None:
        before, now = scaler.wanted, at
        assert scaler.look(0, now) <= before
    assert scaler.wanted == 0
    assert scaler.next_at() is None, "an idle server has no timer"


@pytest.mark.parametrize("wrong", [{"least": 3}, {"most": 0, "least": 0}, {"each": 0}, {"calm_s": -1.0}])
def test_bounds_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="not bounds"):
        Bounds(**{"least": 1, "most": 2, "each": 1, "calm_s": 1.0, **wrong})
