"""The tables of a report, as HTML: recipe and plan with origins, shares of time, what happened, differences."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from shoal.observe.curves import PARTS, Curves
from shoal.observe.units import duration, share, size

SHOWN_CHECKPOINTS = 40


def value_text(value: Any) -> str:
    """A recipe's value as TOML would write it, but text without quotes; an empty text is shown as \"\"."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def settings(values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Dotted key, value and origin, one row each."""
    rows = []
    for key, value in values.items():
        origin = origins.get(key, "default")
        look = "origin plain" if origin == "default" else "origin"
        rows.append(
            f'<tr data-key="{escape(key)}"><th scope="row">{escape(key)}</th>'
            f'<td class="value">{escape(value_text(value))}</td>'
            f'<td><span class="{look}">{escape(origin)}</span></td></tr>'
        )
    head = "<thead><tr><th>key</th><th>value</th><th>origin</th></tr></thead>"
    return f'<div class="scroll"><table class="settings">{head}<tbody>{"".join(rows)}</tbody></table></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Name and value, one row each; None is left out."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td class="value">{escape(value_text(value))}</td></tr>'
        for name, value in values.items()
        if value is not None
    )
    return f'<div class="scroll"><table class="settings">{rows}</table></div>'


def time_shares(runs: Sequence[tuple[str, Curves]]) -> str:
    """A bar of shares and a table of the parts of a step for each run; "" when no run has times."""
    timed = [(name, curves) for name, curves in runs if curves.shares]
    if not timed:
        return ""
    bars = "".join(
        f'<div class="shares">{f"<span>{escape(name)}</span>" if len(runs) > 1 else ""}<div>'
        + "".join(
            f'<i class="part-{part}" style="width:{part_share * 100:.2f}%" title="{part} {share(part_share)}"></i>'
            for part, part_share in curves.shares.items()
            if part_share > 0
        )
        + "</div></div>"
        for name, curves in timed
    )
    head = "".join(f'<th colspan="2">{escape(name)}</th>' for name, _ in timed) if len(runs) > 1 else ""
    head = f"<thead><tr><th></th>{head}</tr></thead>" if head else ""
    rows = ""
    for part in PARTS:
        cells = "".join(
            f"<td>{share(curves.shares[part])}</td><td>{duration(_mean(curves.parts[part].y))}</td>"
            for _, curves in timed
        )
        rows += f'<tr><th scope="row"><i class="swatch part-{part}"></i>{part}</th>{cells}</tr>'
    whole = "".join(f"<td>100 %</td><td>{duration(_mean(curves.seconds.y))}</td>" for _, curves in timed)
    rows += f'<tr class="sum"><th scope="row">a step</th>{whole}</tr>'
    return f'{bars}<div class="scroll"><table class="numbers">{head}<tbody>{rows}</tbody></table></div>'


def waiting(curves: Curves, most: float) -> str:
    """The share of its time that each rank waited for data, as bars; a share of ``most`` fills the width.

    "" when the log does not say."""
    if not curves.waiting:
        return ""
    rows = "".join(
        f'<tr><th scope="row">rank {rank}</th><td class="bar">'
        f'<i style="width:{min(1.0, waited / most) * 100:.1f}%"></i></td><td>{share(waited)}</td></tr>'
        for rank, waited in curves.waiting.items()
    )
    return f'<div class="scroll"><table class="numbers waits"><tbody>{rows}</tbody></table></div>'


def happenings(curves: Curves) -> str:
    """Starts, checkpoints, resumes and stops in the order of time; only the newest and the best checkpoints."""
    rows: list[tuple[float, str, int | None, str]] = []
    for number, session in enumerate(curves.sessions):
        if number == 0:
            rows.append((session.begun, "started", None, _workers(session.facts)))
    shown = set(curves.saved[-SHOWN_CHECKPOINTS:]) | {saved for saved in curves.saved if saved.best}
    for saved in curves.saved:
        if saved in shown:
            cost = f"{size(saved.size_bytes)}, written in {duration(saved.write_s)}"
            cost += f", stalled the steps {duration(saved.stall_s)}"
            kind = "checkpoint ★" if saved.best else "checkpoint"
            rows.append((saved.time, kind, saved.step, f"{cost} · {saved.path}" if saved.path else cost))
    for resume in curves.resumes:
        text = f"from {resume.checkpoint}" if resume.checkpoint else ""
        text += f"; {resume.redone} steps to do again" if resume.redone else ""
        text += "".join(f"; passed over {path}: {why}" for path, why in resume.skipped)
        rows.append((resume.time, "resumed", resume.step, text.lstrip("; ")))
    rows += [(stop.time, stop.kind, stop.step, stop.why) for stop in curves.stops]
    if curves.state == "finished":
        rows.append((curves.sessions[-1].seen, "finished", curves.step, ""))
    rows.sort(key=lambda row: row[0])
    body = "".join(
        f'<tr class="is-{escape(kind.split()[0])}"><td>{duration(curves.active_s(time))}</td><td>{escape(kind)}</td>'
        f'<td>{"" if step is None else f"{step:,}"}</td><td class="long">{escape(text)}</td></tr>'
        for time, kind, step, text in rows
    )
    left_out = len(curves.saved) - len(shown)
    note = f'<p class="note">{left_out} older checkpoints are left out of this table.</p>' if left_out else ""
    head = "<thead><tr><th>after</th><th>what</th><th>step</th><th></th></tr></thead>"
    return f'<div class="scroll"><table class="happenings">{head}<tbody>{body}</tbody></table></div>{note}'


def _workers(started: Mapping[str, Any]) -> str:
    workers = started.get("workers")
    return f"{workers} {'worker' if workers == 1 else 'workers'}" if workers is not None else ""


def differences(names: Sequence[str], settings_of: Sequence[Mapping[str, Any]]) -> str:
    """The keys whose values are not the same in all runs; "" when all are."""
    keys = dict.fromkeys(key for values in settings_of for key in values)
    rows = ""
    for key in keys:
        texts = [value_text(values[key]) if key in values else "–" for values in settings_of]
        if len(set(texts)) > 1:
            cells = "".join(f'<td class="value">{escape(text)}</td>' for text in texts)
            rows += f'<tr data-key="{escape(key)}"><th scope="row">{escape(key)}</th>{cells}</tr>'
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return (
        f'<div class="scroll"><table class="settings differences"><thead><tr><th>key</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
