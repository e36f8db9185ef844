"""The head of a report of one run: what it is, how it ended, its figures and hashes."""

import time
from html import escape
from statistics import median

from shoal.observe.curves import Curves
from shoal.observe.subject import Subject
from shoal.observe.units import amount, duration, figure

STATES = {"finished": "finished", "failed": "failed", "interrupted": "interrupted", "open": "no end in the log"}


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def state(curves: Curves) -> str:
    text = STATES[curves.state]
    if curves.state != "finished" and curves.step:
        text += f" · step {curves.step:,}"
    return f'<span class="state {curves.state}">{text}</span>'


def _tile(name: str, value: float | None, label: str, text: str, below: str = "") -> str:
    number = "" if value is None else f' data-value="{value!r}"'
    return (
        f'<div class="tile" data-figure="{escape(name)}"{number}><dt>{escape(label)}</dt>'
        f"<dd>{escape(text)}<small>{escape(below)}</small></dd></div>"
    )


def steps_of(curves: Curves) -> str:
    return f"of {curves.steps:,}" if curves.steps and curves.steps != curves.step else ""


def headline(subject: Subject) -> str:
    curves = subject.curves
    (rate, unit), parameters = subject.rate, subject.parameters
    samples = median(curves.samples_per_s.y) if unit != "samples" and curves.samples_per_s.y else None
    also = f", {amount(samples)} samples" if samples is not None else ""
    tiles = [_tile("loss", curves.loss.last, "Training loss", figure(curves.loss.last), "last step")]
    for split, named in curves.evaluated.items():
        for name in named:
            best = curves.best(split, name)
            if best and name != "count":
                label = f"{split} {name.replace('_', ' ')}".capitalize()
                tiles.append(_tile(f"{split}.{name}", best[1], label, figure(best[1]), f"best, at step {best[0]:,}"))
    tiles += [
        _tile("steps", float(curves.step), "Steps", f"{curves.step:,}", steps_of(curves)),
        _tile("parameters", parameters, "Parameters", "–" if parameters is None else amount(parameters)),
        _tile("wall", curves.wall_s, "Wall time", duration(curves.wall_s)),
        _tile("rate", rate, "Throughput", "–" if rate is None else amount(rate), f"{unit} a second{also}"),
        _tile("workers", None, "Workers", subject.workers, f"{subject.recipe.get('shards', '?')} shards"),
    ]
    begun = f" · begun {date(curves.sessions[0].begun)}" if curves.sessions else ""
    stopped = curves.stops[-1] if curves.stops and curves.state in ("failed", "interrupted") else None
    why = f'<p class="why">{escape(stopped.why)}</p>' if stopped and stopped.why else ""
    return (
        f"<header>{brand()}<h1>{escape(subject.name)}</h1>"
        f'<p class="under"><b>{escape(subject.model)}</b>{begun} {state(curves)}</p>{why}'
        f'<dl class="tiles">{"".join(tiles)}</dl><dl class="hashes">{_hashes(subject)}</dl></header>'
    )


def _hashes(subject: Subject) -> str:
    weights = f'<dt>weights</dt><dd data-figure="weights">{escape(subject.weights)}</dd>' if subject.weights else ""
    return (
        f"{weights}<dt>recipe</dt><dd>{escape(subject.recipe_hash)}</dd><dt>folder</dt><dd>{escape(subject.path)}</dd>"
    )


def brand() -> str:
    """The name of the page, with three fish on one course."""
    fish = "M0 5c4-6 10-6 14 0l4-3.5v7l-4-3.5c-4 6-10 6-14 0z"
    places = ((0, 6), (15, 0), (15, 12))
    paths = "".join(f'<path d="{fish}" transform="translate({x} {y})"/>' for x, y in places)
    fishes = f'<svg class="fish" viewBox="0 0 34 22" aria-hidden="true">{paths}</svg>'
    return f'<p class="brand">{fishes}Shoal report</p>'
