"""A run's life on one strip: sessions, checkpoints, resumes and stops over the time that it was running."""

from html import escape

from shoal.observe import scale
from shoal.observe.curves import Curves
from shoal.observe.units import duration

SHOWN_MARKS = 300


def strip(name: str, curves: Curves) -> str:
    """One row with a mark for each happening; the time between sessions is left out. "" without any time."""
    whole = curves.wall_s
    if whole <= 0:
        return ""
    across, labels = scale.times([0.0, whole])
    bars, begun = "", 0.0
    for session in curves.sessions:
        lasted = session.seen - session.begun
        bars += f'<i class="session" style="left:{begun / whole * 100:.2f}%;width:{lasted / whole * 100:.2f}%"></i>'
        begun += lasted
    every = max(1, len(curves.saved) // SHOWN_MARKS)
    marks = [
        (saved.time, "best" if saved.best else "saved", f"checkpoint at step {saved.step:,}")
        for i, saved in enumerate(curves.saved)
        if saved.best or i % every == 0
    ]
    marks += [(resume.time, "resumed", f"resumed from step {resume.step:,}") for resume in curves.resumes]
    marks += [(stop.time, stop.kind, f"{stop.kind}: {stop.why}") for stop in curves.stops]
    points = "".join(
        f'<b class="at {kind}" style="left:{curves.active_s(time) / whole * 100:.2f}%" '
        f'title="{escape(text)}, after {duration(curves.active_s(time))}"></b>'
        for time, kind, text in marks
    )
    ticks = "".join(
        f'<span style="left:{across.place(tick) * 100:.2f}%">{text}</span>'
        for tick, text in zip(across.ticks, labels, strict=True)
    )
    return (
        f'<div class="strip"><span>{escape(name)}</span><div class="life">{bars}{points}</div>'
        f'<div class="xs">{ticks}</div></div>'
    )


def key() -> str:
    """What the marks of the strips mean."""
    names = {
        "saved": "checkpoint",
        "best": "best checkpoint",
        "resumed": "resumed",
        "interrupted": "interrupted",
        "failed": "failed",
    }
    items = "".join(f'<li><b class="at {kind}"></b>{text}</li>' for kind, text in names.items())
    return f'<ul class="legend marks">{items}</ul>'
