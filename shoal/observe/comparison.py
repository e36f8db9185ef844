"""The head of a comparison: the figures of each run, whether they computed the same, and what differs in their keys."""

from collections.abc import Sequence
from html import escape

from shoal.observe import figures, tables
from shoal.observe.curves import Curves
from shoal.observe.headline import brand, state, steps_of
from shoal.observe.subject import Subject
from shoal.observe.units import amount, duration, figure


def comparison(subjects: Sequence[Subject]) -> str:
    figures_of = {
        (split, name): None
        for subject in subjects
        for split, named in subject.curves.evaluated.items()
        for name in named
        if name != "count"
    }
    head = "".join(f"<th>best {escape(split)} {escape(name.replace('_', ' '))}</th>" for split, name in figures_of)
    rows = ""
    for i, subject in enumerate(subjects):
        curves = subject.curves
        (rate, unit), parameters = subject.rate, subject.parameters
        bests = [curves.best(split, name) for split, name in figures_of]
        cells = [_cell("loss", curves.loss.last)]
        cells += [
            _cell(f"{split}.{name}", best[1] if best else None)
            for (split, name), best in zip(figures_of, bests, strict=True)
        ]
        cells += [
            _cell("steps", float(curves.step), f"{curves.step:,} {steps_of(curves)}"),
            _cell("wall", curves.wall_s, duration(curves.wall_s)),
            _cell("rate", rate, "–" if rate is None else f"{amount(rate)} {unit}/s"),
            _cell("workers", None, subject.workers),
            _cell("parameters", parameters, "–" if parameters is None else amount(parameters)),
        ]
        rows += (
            f'<tr data-run="{escape(subject.name)}"><th scope="row"><i class="swatch {figures.colour(i)}"></i>'
            f"{escape(subject.name)} {state(curves)}</th>{''.join(cells)}"
            f'<td class="hash" title="{escape(subject.weights)}">{escape(subject.weights[:10]) or "–"}</td></tr>'
        )
    changed = tables.differences(
        [subject.name for subject in subjects],
        [{**subject.recipe, **subject.plan} for subject in subjects],
    )
    differ = f'<div class="panel">{changed}</div>' if changed else "<p>Nothing: all keys have the same values.</p>"
    return (
        f"<header>{brand()}<h1>{len(subjects)} runs compared</h1>"
        f'<p class="verdict">{escape(verdict(subjects))}</p><div class="panel scroll"><table class="numbers runs">'
        f"<thead><tr><th>run</th><th>training loss</th>{head}<th>steps</th><th>wall time</th><th>throughput</th>"
        f"<th>workers</th><th>parameters</th><th>weights</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f"<h3>What differs in recipe and plan</h3>"
        f"{differ}</header>"
    )


def _cell(name: str, value: float | None, text: str | None = None) -> str:
    number = "" if value is None else f' data-value="{value!r}"'
    return f'<td data-figure="{escape(name)}"{number}>{escape(figure(value) if text is None else text)}</td>'


def verdict(subjects: Sequence[Subject]) -> str:
    """One sentence on whether the runs computed the same: by recipe, weights, and the first loss that differs."""
    same_recipe = len({subject.recipe_hash for subject in subjects}) == 1
    weights = {subject.weights for subject in subjects}
    recipe = "The same arithmetic" if same_recipe else "Different recipes"
    if "" not in weights:
        same = len(weights) == 1
        recipe += ", and the same weights, to the bit." if same else ", and different weights."
    else:
        recipe += "; not every run has ended with weights to compare."
    step = first_difference([subject.curves for subject in subjects])
    if step is not None:
        return f"{recipe} The first loss that differs is that of step {step:,}."
    common = set.intersection(*(set(subject.curves.loss.x) for subject in subjects))
    return f"{recipe} The losses of all {len(common):,} common steps are equal." if common else recipe


def first_difference(curves: Sequence[Curves]) -> int | None:
    """The first step, of those that all runs have, whose losses are not equal in every digit."""
    losses = [dict(zip(each.loss.x, map(repr, each.loss.y), strict=True)) for each in curves]
    common = set.intersection(*(set(loss) for loss in losses))
    return next((int(step) for step in sorted(common) if len({loss[step] for loss in losses}) > 1), None)
