"""A sampled step as a picture: what each worker did, and what became of each bucket of gradients."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from shoal.observe import scale
from shoal.observe.communication import Sample, Worker
from shoal.observe.units import duration

MOST_WORKERS = 8
PARTS = {
    "loading": "part-data",
    "forward": "part-forward",
    "backward": "part-backward",
    "exchanging": "part-exchange",
    "waiting": "wait-skew",
    "updating": "part-update",
    "evaluating": "part-other",
    "saving": "part-checkpoint",
}
NAMES = {
    "part-data": "loading",
    "part-forward": "forward",
    "part-backward": "backward",
    "part-exchange": "exchanging",
    "wait-skew": "waiting",
    "part-update": "updating",
}
BUCKETS = {
    "wait-skew": "bucket handed over, others have not",
    "wait-flight": "all have, on its way or in the queue",
    "part-exchange": "being reduced",
}
HEIGHT = 1000


def picture(sample: Sample) -> str:
    """The figure: the whole step above, from the first bucket to the last result below."""
    workers = sample.workers[:MOST_WORKERS]
    if not workers or not workers[0].buckets:
        return ""
    end = max(worker.end for worker in workers)
    first = min(bucket.posted for worker in workers for bucket in worker.buckets)
    last = max(worker.done for worker in workers)
    margin = max(last - first, 1e-6) * 0.04
    whole = _plot(workers, 0.0, end, "The whole step", buckets=False)
    close = _plot(workers, max(0.0, first - margin), last + margin, "From the first bucket to the result", buckets=True)
    count = len(sample.workers)
    left_out = f" Of {count} workers, the first {len(workers)} are drawn." if count > len(workers) else ""
    error = max(worker.clock_error_s for worker in workers)
    unsure = f" Clocks of other hosts are known to {duration(error)}." if error else ""
    note = f'<p class="note">{left_out}{unsure}</p>' if left_out or unsure else ""
    return (
        '<figure class="panel wide buckets"><figcaption><h3>One step, bucket by bucket</h3>'
        f'<span class="unit">step {sample.step:,}, all workers on one clock</span></figcaption>'
        f"{_key({**NAMES})}{whole}{_key(BUCKETS)}{close}{note}</figure>"
    )


def _key(names: dict[str, str]) -> str:
    items = "".join(f'<li><i class="swatch {look}"></i>{escape(name)}</li>' for look, name in names.items())
    return f'<ul class="legend">{items}</ul>'


def _plot(workers: Sequence[Worker], start: float, end: float, title: str, *, buckets: bool) -> str:
    across, labels = _times(end - start)
    lanes = [*(bucket for worker in workers for bucket in worker.buckets)]
    tall = min(160, max(44, 14 + 5 * len(lanes) // len(workers))) if buckets else 26
    rows = "".join(_row(worker, start, end, tall, buckets=buckets) for worker in workers)
    ticks = "".join(
        f'<span style="left:{across.place(tick) * 100:.2f}%">{escape(text)}</span>'
        for tick, text in zip(across.ticks, labels, strict=True)
        if 0 <= across.place(tick) <= 1
    )
    return (
        f'<div class="lanes"><h4>{escape(title)}</h4>{rows}<div class="lane"><span></span>'
        f'<div class="xs" aria-hidden="true">{ticks}</div></div></div>'
    )


def _times(length: float) -> tuple[scale.Scale, list[str]]:
    across = scale.steps([0.0, length * 1000], 7, whole=False)
    return across, [f"{tick:g} ms" for tick in across.ticks]


def _row(worker: Worker, start: float, end: float, tall: int, *, buckets: bool) -> str:
    shapes = ""
    foot = HEIGHT if not buckets else HEIGHT * 10 // tall
    changes = [*worker.phases, ("", worker.end)]
    for (phase, since), (_, until) in pairwise(changes):
        shapes += _bar(PARTS.get(phase, "part-other"), since, until, start, end, 0, foot, phase)
    if buckets:
        room = HEIGHT - foot
        each = room / len(worker.buckets)
        for number, b in enumerate(worker.buckets):
            top, deep = foot + number * each + each * 0.15, each * 0.7
            for look, since, until, what in (
                ("wait-skew", b.posted, b.ready, "waits for another worker"),
                ("wait-flight", b.ready, b.begun, "on its way"),
                ("part-exchange", b.begun, b.reduced, "reduced"),
            ):
                shapes += _bar(look, since, until, start, end, top, deep, f"bucket {number}: {what}")
    finish = (worker.finish - start) / (end - start)
    if 0 < finish < 1:
        shapes += f'<path class="mark" d="M{finish * 1000:.1f} 0V{HEIGHT}"><title>backward is over</title></path>'
    return (
        f'<div class="lane"><span>rank {worker.rank}</span><svg style="height:{tall}px" viewBox="0 0 1000 {HEIGHT}" '
        f'preserveAspectRatio="none" role="img" aria-label="rank {worker.rank}">{shapes}</svg></div>'
    )


def _bar(look: str, since: float, until: float, start: float, end: float, top: float, deep: float, text: str) -> str:
    left, right = max(since, start), min(until, end)
    if right <= left:
        return ""
    x, width = (left - start) / (end - start) * 1000, (right - left) / (end - start) * 1000
    return (
        f'<rect class="{look}" x="{x:.1f}" y="{top:.0f}" width="{max(width, 0.6):.1f}" height="{deep:.0f}">'
        f"<title>{escape(text)}: {duration(until - since)}</title></rect>"
    )
