"""Spans as a trace file for chrome://tracing and Perfetto: a process a worker, a row for each thing it does at once."""

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from shoal.comm.accounting.counters import Span
from shoal.errors import UserError


def trace(spans: Mapping[str, Iterable[Span]]) -> dict[str, Any]:
    """``spans`` by worker, such as "rank 0". Times start at the first of them, in microseconds, as the format asks."""
    listed = {name: sorted(of, key=lambda span: (span.start_s, -span.end_s)) for name, of in spans.items()}
    start = min((span.start_s for of in listed.values() for span in of), default=0.0)
    events: list[dict[str, Any]] = []
    for process, (name, of) in enumerate(listed.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}})
        rows = {row: number for number, row in enumerate(dict.fromkeys(span.row for span in of))}
        for row, number in rows.items():
            about = {"ph": "M", "pid": process, "tid": number}
            events.append({**about, "name": "thread_name", "args": {"name": row}})
            events.append({**about, "name": "thread_sort_index", "args": {"sort_index": number}})
        for span in of:
            if span.end_s < span.start_s:
                continue
            event: dict[str, Any] = {"ph": "X", "name": span.name, "pid": process, "tid": rows[span.row]}
            event["ts"] = round((span.start_s - start) * 1e6, 1)
            event["dur"] = round((span.end_s - span.start_s) * 1e6, 1)
            if span.facts:
                event["args"] = dict(span.facts)
            events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write(spans: Mapping[str, Iterable[Span]], path: Path) -> Path:
    """Raises UserError when the file cannot be written."""
    try:
        path.write_text(json.dumps(trace(spans)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the trace {str(path)!r}: {error.strerror}.") from None
    return path


def bucket_spans(
    number: int, moments: tuple[float, float, float, float], facts: Mapping[str, float | str]
) -> list[Span]:
    """One bucket's way. ``moments``: posted, ready, begun, reduced."""
    posted, ready, begun, reduced = moments
    row = f"bucket {number}"
    return [
        Span(row, "waiting for a worker", posted, ready, facts),
        Span(row, "on its way", ready, begun, facts),
        Span(row, "reducing", begun, reduced, facts),
    ]


def phase_spans(changes: Iterable[tuple[str, float]], end: float) -> list[Span]:
    """What a worker did, from its changes of phase (name, since) up to ``end``."""
    listed = [*changes, ("", end)]
    return [Span("compute", name, since, until) for (name, since), (_, until) in pairwise(listed)]
