"""When requests come, as values: drawn as independent users make them come, or read from a trace."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import UserError

MOST_ARRIVALS = 2_000_000


@dataclass(frozen=True)
class Arrival:
    at: float  # seconds since the begin
    body: int  # which of the bodies


def poisson(rate: float, seconds: float, bodies: int, seed: int) -> list[Arrival]:
    """Requests of many users who know nothing of each other: independent gaps, exponential with a mean of 1 / rate.

    The bodies take turns."""
    if rate * seconds > MOST_ARRIVALS:
        raise UserError(f"{rate:g} requests a second for {seconds:g} s are more than {MOST_ARRIVALS:,}: ask for less.")
    drawn = random.Random(seed)
    arrivals: list[Arrival] = []
    at = drawn.expovariate(rate)
    while at < seconds:
        arrivals.append(Arrival(at, len(arrivals) % bodies))
        at += drawn.expovariate(rate)
    return arrivals


def read_trace(file: Path, speed: float) -> tuple[list[Arrival], list[str]]:
    """The arrivals and the bodies of a trace: a JSON object a line, {"at": seconds, "body": the request's JSON}.

    ``speed`` 2 plays it in half the time. Lines may be in any order. Raises UserError naming the line."""
    arrivals: list[Arrival] = []
    bodies: dict[str, int] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the trace {str(file)!r}: {getattr(error, 'strerror', error)}.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        at, body = _entry(line, f"line {number} of {str(file)!r}")
        arrivals.append(Arrival(at / speed, bodies.setdefault(json.dumps(body), len(bodies))))
        if len(arrivals) > MOST_ARRIVALS:
            raise UserError(f"the trace {str(file)!r} has more than {MOST_ARRIVALS:,} lines.")
    if not arrivals:
        raise UserError(f"the trace {str(file)!r} is empty.")
    return sorted(arrivals, key=lambda one: one.at), list(bodies)


def _entry(line: str, where: str) -> tuple[float, Any]:
    try:
        entry = json.loads(line)
        at, body = float(entry["at"]), entry["body"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f'{where} is not {{"at": seconds, "body": a request}}.') from None
    if not 0 <= at < math.inf:
        raise UserError(f"{where}: 'at' must be a time from 0 on, got {at}.")
    return at, body


def dealt(arrivals: Sequence[Arrival], processes: int) -> list[list[Arrival]]:
    """The same arrivals as ``processes`` shares: a request comes when it comes, whoever sends it."""
    return [list(arrivals[first::processes]) for first in range(processes)]
