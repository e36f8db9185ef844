"""Scales, ticks, units, thinning and the charts' own text: laws that hold for any numbers."""

import json
import math
import re
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal.observe import scale, units
from shoal.observe.curves import Series
from shoal.observe.svg import Chart, Line, embed, line_chart, stacked_chart
from shoal.observe.thinning import averaged, running_mean, thin

finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.lists(st.floats(-1e200, 1e200), min_size=1, max_size=50)
wild = st.lists(st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=300)


def line_of(values, **look):
    return Line("loss", "c0", Series(tuple(range(1, len(values) + 1)), tuple(values)), **look)


@given(numbers, st.booleans())
def test_a_linear_scale_holds_all_its_values_between_round_ticks(values, zero):
    made = scale.linear(values, zero=zero)
    assert all(-1e-6 <= made.place(value) <= 1 + 1e-6 for value in values)
    assert 2 <= len(made.ticks) <= 9
    assert (made.ticks[0], made.ticks[-1]) == (made.low, made.high)
    if zero:
        assert made.low <= 0 <= made.high


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=20))
def test_ticks_of_steps_are_whole_numbers_inside_the_data(values):
    made = scale.steps(values)
    assert all(tick == int(tick) and made.low - 1e-6 <= tick <= made.high + 1e-6 for tick in made.ticks)
    assert len(made.ticks) <= 8


@given(st.lists(st.floats(1e-280, 1e280), min_size=1, max_size=20))
def test_a_log_scale_holds_twelve_decades_below_its_largest_value_and_a_few_ticks(values):
    made = scale.logarithmic(values)
    assert made is not None
    assert all(0 <= made.place(value) <= 1 for value in values if value >= max(values) / 1e12)
    assert 1 <= len(made.ticks) <= 12


def test_there_is_no_log_scale_without_a_positive_value():
    assert scale.logarithmic([0.0, -1.0, math.nan]) is None


def test_time_ticks_are_round_in_their_own_unit():
    assert scale.times([0.0, 3 * 3600.0])[1][-1] == "3 h"
    assert scale.times([0.0, 600.0])[1] == ["0 min", "2 min", "4 min", "6 min", "8 min", "10 min"]
    assert scale.times([0.0, 40.0])[1][-1] == "40 s"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.3171, "2.317"),
        (2.31004, "2.310"),
        (0.001, "0.001"),
        (0.00125, "0.00125"),
        (1e-5, "1e-5"),
        (3.14159e-7, "3.142e-7"),
        (0, "0"),
        (-0.5, "-0.5"),
        (128400.2, "128,400"),
        (math.nan, "NaN"),
        (-math.inf, "-inf"),
        (None, "–"),
    ],
)
def test_figures_read_well(value, text):
    assert units.figure(value) == text


def test_amounts_sizes_times_and_shares_carry_their_units():
    assert [units.amount(v) for v in (950, 12_300, 10_654_321)] == ["950", "12.3k", "10.7M"]
    assert [units.size(v) for v in (12, 42_500, 127_850_000)] == ["12 B", "42.5 kB", "128 MB"]
    assert [units.duration(v) for v in (0, 0.0312, 4.2, 192, 7500)] == [
        "0 s",
        "31.2 ms",
        "4.2 s",
        "3 min 12 s",
        "2 h 05 min",
    ]
    assert [units.share(v) for v in (0, 0.0001, 0.413)] == ["0.0 %", "<0.1 %", "41.3 %"]


@given(st.integers(2001, 6000), st.integers(0, 1000))
def test_thinning_keeps_the_ends_and_every_extreme(count, seed):
    random = Random(seed)
    values = [random.gauss(0, 1) for _ in range(count)]
    low, high = random.randrange(count), random.randrange(count)
    values[low], values[high] = -50.0, 50.0
    series = Series(tuple(range(count)), tuple(values))
    short = thin(series)
    assert len(short) <= 2002
    assert (short.x[0], short.x[-1]) == (0, count - 1)
    assert min(short.y) == min(values)
    assert max(short.y) == max(values)
    assert list(short.x) == sorted(set(short.x))
    assert all(series.y[int(x)] == y for x, y in zip(short.x, short.y, strict=True))


def test_thinning_never_hides_a_value_that_is_not_finite():
    values = [1.0] * 10_000
    values[7777] = math.nan
    assert any(math.isnan(y) for y in thin(Series(tuple(range(10_000)), tuple(values))).y)


def test_a_short_series_is_not_thinned():
    series = Series((1, 2, 3), (3.0, 1.0, 2.0))
    assert thin(series) is series


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_a_running_mean_stays_between_the_extremes(values):
    means = running_mean(Series(tuple(range(len(values))), tuple(values))).y
    assert len(means) == len(values)
    assert all(min(values) - 1e-6 <= mean <= max(values) + 1e-6 for mean in means)


def test_a_running_mean_of_a_straight_line_is_that_line_away_from_its_ends():
    line = Series(tuple(range(100)), tuple(float(i) for i in range(100)))
    assert running_mean(line, window=9).y[4:-4] == line.y[4:-4]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=500), st.integers(1, 200))
def test_averaging_into_columns_keeps_the_mean(values, columns):
    short = averaged(Series(tuple(range(len(values))), tuple(values)), columns)
    assert len(short) == min(columns, len(values))
    if len(values) % len(short) == 0:
        assert sum(short.y) / len(short) == pytest.approx(sum(values) / len(values))


@given(wild, st.booleans(), st.booleans())
@example([0.0] * 9 + [8.988465674311579e307, 8.98846567431158e307], True, False)  # their sum overflows
def test_a_chart_of_any_numbers_has_no_coordinate_that_is_not_one(values, smooth, zero):
    text = line_chart(Chart("Loss", "", [line_of(values, smooth=smooth)], zero=zero))
    for path in re.findall(r' d="([^"]*)"', text):
        assert re.fullmatch(r"[MLHVhZ0-9. -]*", path), path
    data = json.loads(re.search(r'<script type="application/json">(.*)</script>', text)[1])
    assert len(data["series"][0]["y"]) == len(values)


def test_a_line_breaks_where_a_value_is_not_finite_and_says_so():
    text = line_chart(Chart("Loss", "", [line_of([1.0, 2.0, math.nan, 2.0, 1.0])]))
    path = re.search(r'class="line c0" data-series="0" d="([^"]*)"', text)[1]
    assert path.count("M") == 2
    assert "loss: NaN at step 3" in text


def test_a_chart_without_points_is_not_drawn():
    assert line_chart(Chart("Loss", "", [Line("loss", "c0", Series())])) == ""
    assert stacked_chart(Chart("Time", "", [Line("data", "c0", Series())])) == ""


@pytest.mark.parametrize(("count", "hidden"), [(4, False), (5, True)])
def test_the_noise_of_many_smoothed_lines_does_not_cover_them(count, hidden):
    lines = [Line(f"rank {i}", "c0", Series(tuple(range(20)), (1.0, 2.0) * 10), smooth=True) for i in range(count)]
    assert ('class="chart smoothed many"' in line_chart(Chart("Waiting", "", lines))) == hidden


def test_stacked_columns_lie_on_each_other():
    lines = [Line(name, "c0", Series((1, 2), (1.0, 1.0))) for name in ("a", "b")]
    text = stacked_chart(Chart("Time", "", lines, "seconds"))
    lower, upper = re.findall(r'class="band[^>]* d="([^"]*)"', text)
    assert lower.startswith("M0.0 500.0L")
    assert upper.startswith("M0.0 0.0L")
    assert "500.0" in upper.split("L")[-1]


def test_one_slow_step_is_cut_and_told_rather_than_flattening_the_rest():
    lines = [Line("data", "c0", Series(tuple(range(100)), (60.0, *[0.1] * 99)))]
    text = stacked_chart(Chart("Time", "", lines, "seconds"))
    assert "the highest is 1 min 00 s" in text


def test_json_inside_a_page_cannot_close_its_element():
    assert "<" not in embed({"name": "</script><script>alert(1)</script>"})
    assert json.loads(embed({"name": "</script>"})) == {"name": "</script>"}


def test_names_in_a_chart_are_text():
    chart = Chart(
        "<b>", "<i>", [Line("<u>", "c0", Series((1,), (1.0,))), Line("v", "c1", Series((1,), (1.0,)))], note="<s>"
    )
    text = line_chart(chart)
    assert not re.search(r"<(b|u|s)>", text)
