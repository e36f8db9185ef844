"""Numbers as people read them: figures, counts, durations, bytes, shares."""

import math

_BIG = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figure(value: float | None, digits: int = 4) -> str:
    """A measured value in about ``digits`` significant digits: 2.317, 0.00125, 3.1e-05, 128,400."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "NaN")
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 9:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= digits - 1:
        return f"{value:,.0f}"
    text = f"{value:.{digits - 1 - size}f}"
    short = text.rstrip("0").rstrip(".")
    return short if float(short) == value else text  # zeros that say how exact it was stay: 2.310 for 2.31004


def amount(value: float, digits: int = 3) -> str:
    """A count or a rate with a suffix: 950, 12.3k, 10.6M."""
    if not math.isfinite(value):
        return figure(value)
    for unit, suffix in _BIG:
        if abs(value) >= unit * 0.99995:
            return f"{figure(value / unit, digits)}{suffix}"
    return figure(value, digits)


def size(value: float) -> str:
    """Bytes with decimal prefixes, as file managers show them: 42.5 MB."""
    for unit, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{figure(value / unit, 3)} {suffix}"
    return f"{value:.0f} B"


def binary_size(value: float) -> str:
    """Bytes with binary prefixes, as tensors are measured: 64 KiB, 1.5 MiB."""
    for unit, suffix in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= unit:
            return f"{figure(value / unit, 3)} {suffix}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """0.8 ms, 31.2 ms, 4.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 0.9995:
        return f"{figure(seconds * 1000, 3)} ms" if seconds else "0 s"
    if seconds < 59.95:
        return f"{figure(seconds, 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def share(value: float) -> str:
    """A share of 1 in per cent: 41.3 %; a small one is not rounded to nothing."""
    if 0 < value < 0.0005:
        return "<0.1 %"
    return f"{value * 100:.1f} %"
