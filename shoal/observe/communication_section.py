"""The section on communication: the finding first, then what would help, then the numbers it rests on."""

from collections.abc import Sequence
from html import escape

from shoal.observe import bucket_picture, traffic_tables
from shoal.observe.bottleneck import bottleneck
from shoal.observe.communication import Communication


def section(named: Sequence[tuple[str, Communication | None]]) -> str:
    """Of one run, or of several one after the other; "" when no log tells of communication."""
    told = [(name, c) for name, c in named if c]
    if not told:
        return ""
    if len(named) == 1:
        return of_one(told[0][1])
    return side_by_side(told)


def finding(c: Communication) -> str:
    found = bottleneck(c)
    look = "calm" if found.kind == "compute" else "notable"
    return f'<p class="finding {look}" data-bottleneck="{found.kind}">{escape(found.sentence)}</p>'


def of_one(c: Communication) -> str:
    waits = traffic_tables.matrix(c)
    text = finding(c)
    helps = (
        "What would help",
        "Predicted from this run’s own numbers, each change by itself.",
        "" if c.mesh else traffic_tables.help_table(c),
    )
    text += _panels(
        *([] if c.mesh else [helps]),
        ("Where a step goes", "Seconds of the mean worker.", traffic_tables.time_of_a_step(c)),
        look="unequal",
    )
    text += _panels(("Operations", _means(c), traffic_tables.operations(c)), wide=True)
    skew = "Rows stand still for columns until they arrive (skew), then until the bytes are here (transfer). A step."
    ways = "Predicted for the same gradients and link. Bytes are those of one direction; the other has as many."
    text += _panels(
        *([("Who waits for whom", skew, waits)] if waits else []),
        *([] if c.mesh else [("All-reduce or parameter servers", ways, traffic_tables.other_ways(c))]),
    )
    return text + (bucket_picture.picture(c.samples[-1]) if c.samples else "")


def _means(c: Communication) -> str:
    return (
        f"Of the mean worker in a step; {c.steps:,} steps. Hidden: while it computed. Exposed: it stood still. "
        "The last columns split both by what the time went to."
        + (" In brackets: the axes of the mesh along which an operation’s workers lie." if c.mesh else "")
    )


def _panels(*panels: tuple[str, str, str], wide: bool = False, look: str = "") -> str:
    inside = "".join(
        f'<div class="panel{" wide" if wide else ""}"><h3>{escape(title)}</h3>'
        f'<p class="note">{escape(note)}</p>{body}</div>'
        for title, note, body in panels
    )
    return f'<div class="panels {look}">{inside}</div>'


def side_by_side(told: Sequence[tuple[str, Communication]]) -> str:
    """What each run measured, in one table; then each run's finding and its own predictions of the other ways."""
    text = _panels(("Measured", "Of the mean worker in a step.", traffic_tables.measured(told)), wide=True)
    for name, c in told:
        ways = "Predicted from this run; beside it the exposed seconds and the step that other runs measured."
        others = [(other, of) for other, of in told if of is not c]
        text += f"<h3>{escape(name)}</h3>{finding(c)}"
        if c.mesh:
            continue  # the predictions are of whole gradients, summed by all workers
        text += _panels(
            ("What would help", "Predicted, each change by itself.", traffic_tables.help_table(c)),
            ("All-reduce or parameter servers", ways, traffic_tables.other_ways(c, others)),
            wide=True,
        )
    return text
