"""Pictures of a timeline: as text that fits a terminal, and as an SVG that stands alone."""

from collections.abc import Callable
from html import escape

from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.activations import peak_activations
from shoal.parallel.schedules.simulation import Timeline

_BLUE, _ORANGE, _GREEN = (
    ((47, 111, 181), (147, 190, 235)),
    ((198, 90, 17), (246, 178, 120)),
    ((63, 143, 95), (155, 210, 175)),
)
_COLOURS = {  # of a worker's first chunk and of its last one; they tell apart for the colour-blind too
    Kind.FORWARD: _BLUE,
    Kind.BACKWARD: _ORANGE,
    Kind.BACKWARD_INPUT: _ORANGE,
    Kind.BACKWARD_WEIGHT: _GREEN,
}
_MEANING = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward, of inputs",
    Kind.BACKWARD_WEIGHT: "backward, of weights",
}
_LEFT, _TOP, _ROW, _RIGHT = 84, 58, 34, 108


def timeline_text(timeline: Timeline, width: int = 100) -> str:
    """A line a worker: "F1.0" is the forward pass of chunk 1 on micro-batch 0; . is idle.

    Where that does not fit it is "F0", small for a later chunk of its worker, and then one letter a pass. What does not
    fit then is cut off, and the last line says so."""
    rows = timeline.schedule.actions
    name = len(f"worker {len(rows) - 1}") + 2
    room = max(width - name, 20)
    shortest = _shortest(timeline)
    labels: tuple[Callable[[Action], str], ...] = (str, lambda a: f"{_letter(timeline, a)}{a.micro_batch}")
    forms = [(form, max(len(form(action)) for row in rows for action in row) + 1) for form in labels]
    letters: tuple[Callable[[Action], str], int] = (lambda action: _letter(timeline, action), 1)
    form, columns = next((f for f in forms if timeline.span / shortest * f[1] <= room), letters)
    scale = columns / shortest
    lines = [
        f"{f'worker {worker}':<{name}}{_line(timeline, worker, form, scale)[:room]}".rstrip()
        for worker in range(len(rows))
    ]
    whole = round(timeline.span * scale)
    if whole > room:
        lines.append(f"(the first {room / whole:.0%}; an SVG shows all)")
    return "\n".join(lines)


def _line(timeline: Timeline, worker: int, form: Callable[[Action], str], scale: float) -> str:
    text = ["."] * round(timeline.span * scale)
    passes = zip(timeline.schedule.actions[worker], timeline.starts[worker], timeline.ends[worker], strict=True)
    for action, start, end in passes:
        first, last = round(start * scale), round(end * scale)
        label = form(action)
        room = last - first
        body = label * room if len(label) == 1 else f"{label.ljust(room - 1, '-')} "
        text[first:last] = body[:room]
    return "".join(text)


def _letter(timeline: Timeline, action: Action) -> str:
    """Small for the later chunks of a worker."""
    first = timeline.schedule.chunks_of(timeline.schedule.worker_of(action.chunk))[0]
    return str(action.kind) if action.chunk == first else action.kind.lower()


def timeline_svg(timeline: Timeline) -> str:
    """Time goes to the right, a lane a worker; the number in a box is its micro-batch."""
    schedule = timeline.schedule
    peaks = peak_activations(schedule)
    shortest = _shortest(timeline)
    step = min(26.0, max(2.0, 1400 * shortest / timeline.span))  # pixels of the shortest pass
    scale = step / shortest
    width = max(_LEFT + timeline.span * scale + _RIGHT, 640)
    height = _TOP + _ROW * schedule.workers + 62
    title = (
        f"{schedule.name}: {schedule.workers} workers, {schedule.chunks} chunks, "
        f"micro-batches: {schedule.micro_batches}, bubble {timeline.bubble:.1%}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width:.0f}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="26" font-size="16" fill="#1d2733">{escape(title)}</text>',
        f'<text x="{_LEFT + timeline.span * scale + 12:.1f}" y="{_TOP - 8}" fill="#5b6770">activations</text>',
    ]
    for worker in range(schedule.workers):
        y = _TOP + _ROW * worker
        parts.append(f'<text x="12" y="{y + 20}" fill="#1d2733">worker {worker}</text>')
        parts.append(
            f'<rect x="{_LEFT}" y="{y + 2}" width="{timeline.span * scale:.1f}" height="{_ROW - 4}" fill="#f1f3f5"/>'
        )
        parts += _boxes(timeline, worker, y, scale)
        x = _LEFT + timeline.span * scale + 12
        parts.append(f'<text x="{x:.1f}" y="{y + 20}" fill="#1d2733">{peaks[worker].together:g} at most</text>')
    return "\n".join([*parts, *_legend(timeline, height), "</svg>\n"])


def _boxes(timeline: Timeline, worker: int, y: int, scale: float) -> list[str]:
    own = timeline.schedule.chunks_of(worker)
    boxes = []
    passes = zip(timeline.schedule.actions[worker], timeline.starts[worker], timeline.ends[worker], strict=True)
    for action, start, end in passes:
        x, wide = _LEFT + start * scale, (end - start) * scale
        late = own.index(action.chunk) / max(len(own) - 1, 1)  # 0 the worker's first chunk, 1 its last one
        fill = _tint(action.kind, late)
        boxes.append(
            f'<rect x="{x:.1f}" y="{y + 3}" width="{max(wide - 1, 0.5):.1f}" height="{_ROW - 6}" rx="2" fill="{fill}">'
            f"<title>{action}, {start:g} to {end:g}</title></rect>"
        )
        number = str(action.micro_batch)
        if wide >= 8 * len(number) + 2:
            ink = "#1d2733" if late > 0.3 else "#ffffff"
            boxes.append(f'<text x="{x + wide / 2:.1f}" y="{y + 21}" text-anchor="middle" fill="{ink}">{number}</text>')
    return boxes


def _tint(kind: Kind, late: float) -> str:
    first, last = _COLOURS[kind]
    return "#" + "".join(f"{round(a + (b - a) * late):02x}" for a, b in zip(first, last, strict=True))


def _legend(timeline: Timeline, height: int) -> list[str]:
    used = {action.kind for row in timeline.schedule.actions for action in row}
    several = timeline.schedule.chunks > timeline.schedule.workers
    parts, x = [], _LEFT
    for kind in (kind for kind in _COLOURS if kind in used):
        parts.append(f'<rect x="{x}" y="{height - 40}" width="14" height="14" rx="2" fill="{_tint(kind, 0)}"/>')
        if several:
            x += 16
            parts.append(f'<rect x="{x}" y="{height - 40}" width="14" height="14" rx="2" fill="{_tint(kind, 1)}"/>')
        parts.append(f'<text x="{x + 20}" y="{height - 28}" fill="#1d2733">{_MEANING[kind]}</text>')
        x += 36 + 6 * len(_MEANING[kind])
    if several:
        parts.append(
            f'<text x="{_LEFT}" y="{height - 8}" fill="#5b6770">the paler, the later the chunk of its worker</text>'
        )
    return parts


def _shortest(timeline: Timeline) -> float:
    """Of all passes that take any time."""
    rows = zip(timeline.starts, timeline.ends, strict=True)
    lengths = [end - start for starts, ends in rows for start, end in zip(starts, ends, strict=True) if end > start]
    return min(lengths, default=1.0)
