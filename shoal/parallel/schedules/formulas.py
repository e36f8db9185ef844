"""The theory of each schedule: idle time and activations, without a simulation.

F, I and W take equally long and messages no time. "m" is micro-batches, "p" workers, "v" chunks of each. The papers'
formulas hold from some number of micro-batches on; the terms for fewer are our own, and the tests hold all of them
against the simulation."""

from shoal.errors import unknown_name
from shoal.parallel.schedules.registry import MAKERS


def idle(name: str, p: int, m: int, v: int = 1) -> int:
    """What a worker stands still in one step, from its common start to its common end, in passes of one chunk."""
    few = max(0, p - m)
    match name:
        case "off":
            return 3 * m * (p - 1)
        case "gpipe" | "1f1b":
            return 3 * (p - 1)
        case "interleaved" | "breadth-first":
            return 3 * (p - 1 + (v - 1) * few)
        case "zb-h1":
            return p - 1 + few
        case "zb-h2":
            return p - 1 + max(0, (2 * p - 1 - m) // 2)
        case "zb-v":
            return p - 1 + max(0, 3 * p - 1 - 2 * m)
        case "dualpipe-v":
            return p - 1 + (2 * (2 * p - 1 - m) if m <= p else max(0, 2 * (2 * p - m)))
    raise unknown_name("schedule", name, MAKERS)


def bubble(name: str, p: int, m: int, v: int = 1) -> float:
    """Share of a step in which a worker stands still: (p - 1) / (m + p - 1) for GPipe and 1F1B."""
    busy = 3 * m * (MAKERS[name].chunks or v) if name in MAKERS else 0
    still = idle(name, p, m, v)
    return still / (busy + still)


def peak(name: str, worker: int, p: int, m: int, v: int = 1) -> int:
    """The most (chunk, micro-batch) pairs whose activations a worker keeps, those that wait for W among them."""
    to_last = p - worker
    match name:
        case "off":
            return 1
        case "gpipe":
            return m
        case "1f1b":
            return min(to_last, m)
        case "interleaved":
            return min(v * m, 2 * (to_last - 1) + (v - 1) * largest_group(p, m) + 1)
        case "breadth-first":
            return v * m
        case "zb-h1":
            return min(p, m)
        case "zb-h2":
            return min(2 * p - 1, m)
        case "zb-v":
            return min(2 * p, 2 * m, m + 1 + worker)
        case "dualpipe-v":
            return min(2 * p + 1, 2 * m, m + 1 + worker)
    raise unknown_name("schedule", name, MAKERS)


def full_peak(name: str, worker: int, p: int, m: int, v: int = 1) -> int:
    """As `peak`, without the pairs that only wait for their weight gradient."""
    to_last = p - worker
    if name == "zb-h1":
        return min(to_last, m)
    if name == "zb-h2":
        return min(2 * to_last - 1, m)
    return peak(name, worker, p, m, v)


def largest_group(p: int, m: int) -> int:
    """Micro-batches that go round together in the interleaved order: p, or more where p does not divide m."""
    return -(-m // max(1, m // p))
