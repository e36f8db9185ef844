"""A batch that changed: what was decided after which step, and of what, as a report shows it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from shoal.observe.curves import number


@dataclass(frozen=True)
class Rebatched:
    """One change; what a log does not tell is None."""

    step: int
    before: int
    batch: int
    lr_before: float | None
    lr: float | None
    noise_scale: float | None  # in samples
    goodput: tuple[float, float] | None  # before, and predicted
    why: str


def read_batches(events: Iterable[Mapping[str, Any]]) -> tuple[Rebatched, ...]:
    """The changes that hold: those of steps that were thrown away with a checkpoint's return are left out."""
    found: dict[int, Rebatched] = {}
    for event in events:
        step = number(event.get("step"))
        if step is None:
            continue
        if event.get("event") == "resumed":
            found = {done: change for done, change in found.items() if done <= step}
        if event.get("event") == "rebatched":
            found[int(step)] = _change(event, int(step))
    return tuple(found[step] for step in sorted(found))


def _change(event: Mapping[str, Any], step: int) -> Rebatched:
    both = event.get("goodput")
    told = [value for each in both if (value := number(each)) is not None] if isinstance(both, list) else []
    return Rebatched(
        step=step,
        before=int(number(event.get("before")) or 0),
        batch=int(number(event.get("batch")) or 0),
        lr_before=number(event.get("lr_before")),
        lr=number(event.get("lr")),
        noise_scale=number(event.get("noise_scale")),
        goodput=(told[0], told[1]) if len(told) == 2 else None,
        why=str(event.get("why", "")),
    )


def section(named: Sequence[tuple[str, Sequence[Rebatched]]]) -> str:
    """Of one run, or of several one after the other; "" when no batch has changed."""
    text = ""
    for name, changes in named:
        if changes:
            heading = f"<h3>{escape(name)}</h3>" if len(named) > 1 else ""
            text += f'{heading}{_finding(changes)}<div class="panel wide">{_table(changes)}</div>'
    return text


def _finding(changes: Sequence[Rebatched]) -> str:
    most, times = max(change.batch for change in changes), "once" if len(changes) == 1 else f"{len(changes)} times"
    said = f"The batch changed {times}: {changes[0].before} samples at first, {most} at most, {changes[-1].batch} in "
    said += "the end. Given these decisions the weights follow to the bit."
    return f'<p class="finding calm">{escape(said)}</p>'


def _table(changes: Sequence[Rebatched]) -> str:
    rows = "".join(
        f'<tr><th scope="row">after step {change.step:,}</th><td class="value">{change.before} → {change.batch}</td>'
        f'<td class="value">{_say(change.lr_before)} → {_say(change.lr)}</td>'
        f'<td class="value">{_say(change.noise_scale)}</td>'
        f'<td class="value">{" → ".join(map(_say, change.goodput)) if change.goodput else "–"}</td>'
        f"<td>{escape(change.why)}</td></tr>"
        for change in changes
    )
    head = "".join(f"<th>{name}</th>" for name in ("samples", "learning rate", "noise scale", "goodput", "why"))
    return (
        '<p class="note">Goodput: samples a second, each times its statistical efficiency; before, and predicted.</p>'
        f'<div class="scroll"><table class="settings"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _say(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
