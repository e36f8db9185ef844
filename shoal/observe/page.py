"""The report page put together: head, headline, sections. Pure, from what is known of the runs to one HTML text."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from shoal.observe import (
    batch_section,
    communication_section,
    figures,
    memory_section,
    pipeline_section,
    tables,
    timeline,
)
from shoal.observe.comparison import comparison
from shoal.observe.figures import Named
from shoal.observe.headline import date, headline
from shoal.observe.subject import Subject

SHOWN_SAMPLES = 6
_ELSEWHERE = ("event", "time", "recipe_hash", "transport", "memory")  # facts of a session that other sections tell


def render(subjects: Sequence[Subject], style: str, script: str, now: float) -> str:
    """The whole document, with ``style`` and ``script`` inside. ``now``: Unix seconds, for the foot of the page."""
    runs = [Named(subject.name, subject.curves) for subject in subjects]
    body = headline(subjects[0]) if len(subjects) == 1 else comparison(subjects)
    sections = [
        ("learning", "Learning", *_learning(runs)),
        ("speed", "Speed", *_speed(runs)),
        ("batch", "Batch", *_batch(subjects)),
        ("pipeline", "Pipeline", *_pipeline(subjects)),
        ("communication", "Communication", *_communication(subjects)),
        ("memory", "Memory", *_memory(subjects)),
        ("life", "Checkpoints and restarts", *_life(subjects)),
        ("samples", "Samples from the model", *_samples(subjects)),
        ("recipe", "Recipe and plan", *_settings(subjects)),
        ("environment", "Environment", *_environment(subjects)),
    ]
    shown = [(anchor, title, text) for anchor, title, text, present in sections if present]
    contents = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in shown)
    title = subjects[0].name if len(subjects) == 1 else f"{len(subjects)} runs compared"
    text = f"{body}<nav>{contents}</nav>" + "".join(
        f'<section id="{anchor}"><h2>{head}</h2>{text}</section>' for anchor, head, text in shown
    )
    return document(f"{title} · Shoal report", text, style, script, now)


def document(title: str, body: str, style: str, script: str, now: float) -> str:
    """``body`` as a page of its own. The policy in the head forbids it to load anything, and any script but this."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}"
        f"<footer>Written by Shoal on {date(now)}. This page is one file and needs no network.</footer>"
        f"</main><script>{script}</script></body></html>\n"
    )


def _learning(runs: Sequence[Named]) -> tuple[str, bool]:
    charts = figures.learning(runs)
    return f'<div class="charts">{charts}</div>', bool(charts)


def _speed(runs: Sequence[Named]) -> tuple[str, bool]:
    charts = figures.speed(runs)
    shares = tables.time_shares([(run.name, run.curves) for run in runs])
    most = max((waited for run in runs for waited in run.curves.waiting.values()), default=0.0)
    most = max(most, 0.1)  # less than a tenth is not drawn as if it were much
    waits = "".join(_titled(run.name if len(runs) > 1 else "", tables.waiting(run.curves, most)) for run in runs)
    look = "panel wide" if len(runs) > 1 else "panel"
    panels = f'<div class="{look}"><h3>Shares of a step</h3>{shares}</div>' if shares else ""
    panels += f'<div class="{look}"><h3>Time spent waiting for data</h3>{waits}</div>' if waits else ""
    return f'<div class="charts">{charts}</div><div class="panels">{panels}</div>', bool(charts or panels)


def _batch(subjects: Sequence[Subject]) -> tuple[str, bool]:
    text = batch_section.section([(subject.name, subject.batches) for subject in subjects])
    return text, bool(text)


def _pipeline(subjects: Sequence[Subject]) -> tuple[str, bool]:
    text = pipeline_section.section([(subject.name, subject.pipeline) for subject in subjects])
    return text, bool(text)


def _communication(subjects: Sequence[Subject]) -> tuple[str, bool]:
    text = communication_section.section([(subject.name, subject.communication) for subject in subjects])
    return text, bool(text)


def _memory(subjects: Sequence[Subject]) -> tuple[str, bool]:
    text = memory_section.section([(subject.name, subject.memory) for subject in subjects])
    return text, bool(text)


def _titled(name: str, text: str) -> str:
    return f"<h4>{escape(name)}</h4>{text}" if name and text else text


def _life(subjects: Sequence[Subject]) -> tuple[str, bool]:
    strips = "".join(timeline.strip(s.name if len(subjects) > 1 else "", s.curves) for s in subjects)
    text = f"{timeline.key()}{strips}" if strips else ""
    for subject in subjects:
        table = tables.happenings(subject.curves)
        if len(subjects) > 1:
            text += f"<details><summary>{escape(subject.name)}</summary>{table}</details>"
        else:
            text += table
    return text, any(subject.curves.sessions for subject in subjects)


def _samples(subjects: Sequence[Subject]) -> tuple[str, bool]:
    text = ""
    for subject in subjects:
        newest = subject.curves.samples[-SHOWN_SAMPLES if len(subjects) == 1 else -1 :]
        for sample in reversed(newest):
            name = f"{subject.name} · " if len(subjects) > 1 else ""
            text += (
                f'<figure class="sample"><figcaption>{escape(name)}step {sample.step:,}</figcaption>'
                f"<pre>{escape(sample.text)}</pre></figure>"
            )
    return text, bool(text)


def _settings(subjects: Sequence[Subject]) -> tuple[str, bool]:
    text = ""
    for subject in subjects:
        both = (
            '<div class="panels"><div class="panel"><h3>Recipe</h3>'
            '<p class="note">What decides the run’s arithmetic.</p>'
            f"{tables.settings(subject.recipe, subject.origins)}</div>"
            '<div class="panel"><h3>Plan</h3>'
            '<p class="note">Where the work runs: time and memory, never the result.</p>'
            f"{tables.settings(subject.plan, subject.origins)}</div></div>"
        )
        if len(subjects) > 1:
            both = f"<details><summary>{escape(subject.name)}</summary>{both}</details>"
        text += both
    return text, True


def _environment(subjects: Sequence[Subject]) -> tuple[str, bool]:
    text = ""
    for subject in subjects:
        for number, session in enumerate(subject.curves.sessions):
            known = {key: value for key, value in session.facts.items() if key not in _ELSEWHERE}
            if not known:
                continue
            several = len(subject.curves.sessions) > 1
            heading = subject.name if len(subjects) > 1 else ""
            heading += f"{' · ' if heading else ''}session {number + 1}" if several else ""
            text += f'<div class="panel">{_titled(heading, tables.facts(known))}</div>'
    return f'<div class="panels">{text}</div>', bool(text)
