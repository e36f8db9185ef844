"""Long series made short enough to draw, without losing what stands out; and their running means."""

import math

from shoal.observe.curves import Series

MOST_POINTS = 2000


def thin(series: Series, most: int = MOST_POINTS) -> Series:
    """At most about ``most`` points. Of each stretch of steps the lowest and the highest value stay, in their order,
    as do the first and the last point of the series and a non-finite value in every stretch that has one."""
    count = len(series)
    if count <= most:
        return series
    stretches = most // 2
    kept = {0, count - 1}
    for number in range(stretches):
        indices = range(number * count // stretches, (number + 1) * count // stretches)
        finite = [i for i in indices if math.isfinite(series.y[i])]
        if finite:
            kept |= {min(finite, key=series.y.__getitem__), max(finite, key=series.y.__getitem__)}
        if len(finite) < len(indices):
            kept.add(next(i for i in indices if not math.isfinite(series.y[i])))
    order = sorted(kept)
    return Series(tuple(series.x[i] for i in order), tuple(series.y[i] for i in order))


def running_mean(series: Series, window: int | None = None, most: int = MOST_POINTS) -> Series:
    """The mean over a centred window of points (a fortieth of the series), at most ``most`` of them.

    The window shrinks on both sides alike towards the ends, so that a slope is not bent there, but not below a quarter,
    so that the ends are smooth too. Non-finite values are left out; a window without any other value is NaN."""
    count = len(series)
    half = (window if window is not None else max(3, count // 40)) // 2
    taken = min(most, count)
    places = [n * (count - 1) // (taken - 1) for n in range(taken)] if taken > 1 else list(range(taken))
    means = []
    for i in places:
        reach = max(min(half, i, count - 1 - i), half // 4)
        inside = [y for y in series.y[max(0, i - reach) : i + reach + 1] if math.isfinite(y)]
        means.append(math.fsum(y / len(inside) for y in inside) if inside else math.nan)
    return Series(tuple(series.x[i] for i in places), tuple(means))


def averaged(series: Series, columns: int) -> Series:
    """The means of at most ``columns`` neighbouring stretches; x is the first step of each."""
    count = len(series)
    columns = min(columns, count)
    bounds = [(n * count // columns, (n + 1) * count // columns) for n in range(columns)]
    return Series(
        tuple(series.x[low] for low, _ in bounds),
        tuple(sum(series.y[low:high]) / (high - low) for low, high in bounds),
    )
