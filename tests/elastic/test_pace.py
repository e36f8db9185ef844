"""Who is slow, and how many shards each should have: from seconds alone."""

import pytest

from shoal.elastic.pace import IN_A_ROW, WINDOW, Pace, evenly


def told(pace: Pace, seconds: list[float], shards: tuple[int, ...], windows: int = 1) -> dict[int, str]:
    """``seconds`` a shard of seats 10, 11, ... over whole windows; what the last one said."""
    found: dict[int, str] = {}
    for _ in range(windows):
        spent = [s * n * WINDOW for s, n in zip(seconds, shards, strict=True)]
        phases = {
            "forward": [s / 4 for s in spent],
            "backward": [3 * s / 4 for s in spent],
            "waiting": [9.0] * len(spent),
        }
        found = pace.told([10 + rank for rank in range(len(shards))], shards, phases, WINDOW)
    return found


def test_a_worker_is_slow_when_two_windows_in_a_row_say_so_and_is_named_once():
    pace = Pace()
    assert told(pace, [0.01, 0.03, 0.01], (3, 3, 2)) == {}
    found = told(pace, [0.01, 0.03, 0.01], (3, 3, 2))
    assert list(found) == [11]
    assert "30.0 ms a shard, where the middle one of the others takes 10.0 ms" in found[11]
    assert told(pace, [0.01, 0.03, 0.01], (3, 3, 2)) == {}


def test_more_shards_are_no_slowness_and_a_short_burst_is_none_either():
    assert told(Pace(), [0.01, 0.01], (7, 1), IN_A_ROW) == {}
    pace = Pace()
    told(pace, [0.01, 0.05], (4, 4))
    told(pace, [0.01, 0.01], (4, 4))
    assert told(pace, [0.01, 0.05], (4, 4)) == {}


@pytest.mark.parametrize(
    ("seconds", "shares"),
    [([1.0, 1.0], (4, 4)), ([1.0, 3.0], (6, 2)), ([1.0, 100.0], (7, 1)), ([1.0, 1.0, 2.0], (4, 3, 1))],
)
def test_shards_go_to_who_is_done_first_and_nobody_is_left_without(seconds, shares):
    pace = Pace()
    told(pace, seconds, evenly(len(seconds), 8))
    assert pace.deal([10 + rank for rank in range(len(seconds))], 8) == shares


def test_without_any_figure_all_have_the_same():
    assert Pace().deal([1, 2, 3], 8) == evenly(3, 8) == (3, 3, 2)
