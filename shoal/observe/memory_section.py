"""The section on memory, of runs under a budget: what was predicted for each worker, what was then observed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from shoal.observe.curves import Event, number
from shoal.observe.units import binary_size

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser states",
    "checkpoint": "copy for checkpoints",
    "data": "batches",
    "messages": "messages to other stages",
    "activations": "activations",
    "update": "update",
    "peak": "predicted peak",
}
_WAYS = {
    "plain": "keep all",
    "selective": "drop what is cheap to compute",
    "full": "are computed again in full",
    "away": "are computed again, their inputs on disk",
}


@dataclass(frozen=True)
class Told:
    """What the log of the newest session says about memory, in bytes."""

    budget: float
    ways: tuple[Mapping[str, int], ...]  # of each rank: way -> blocks, as they are in the end
    predicted: tuple[Mapping[str, float], ...]  # of each rank
    observed: tuple[float, ...]  # the most of each rank
    exact: bool  # the allocator's count


def read_memory(events: Iterable[Event]) -> Told | None:
    """None for a run without a budget."""
    told: Told | None = None
    for event in events:
        found = event.get("memory")
        if event.get("event") == "started":
            told = _started(found) if isinstance(found, Mapping) else None
        elif event.get("event") == "committed" and told is not None and isinstance(found, Mapping):
            told = _committed(told, found)
    return told


def _started(found: Mapping[str, Any]) -> Told | None:
    budget, ways = number(found.get("budget")), _ways(found.get("ways"))
    ranks = found.get("predicted")
    if budget is None or not isinstance(ranks, list):
        return None
    predicted = tuple({key: number(each.get(key)) or 0.0 for key in _PARTS} for each in ranks if isinstance(each, dict))
    return Told(budget, ways, predicted, (0.0,) * len(predicted), bool(found.get("exact")))


def _committed(told: Told, found: Mapping[str, Any]) -> Told:
    peaks = found.get("peaks")
    if not isinstance(peaks, list) or len(peaks) != len(told.observed):
        return told
    observed = tuple(max(most, number(peak) or 0.0) for most, peak in zip(told.observed, peaks, strict=True))
    return Told(told.budget, _ways(found.get("ways")) or told.ways, told.predicted, observed, told.exact)


def _ways(found: Any) -> tuple[dict[str, int], ...]:
    if not isinstance(found, list):
        return ()
    return tuple({str(way): int(count) for way, count in each.items()} for each in found if isinstance(each, Mapping))


def section(named: Sequence[tuple[str, Told | None]]) -> str:
    """Of one run, or of several one after the other; "" when none had a budget."""
    text = ""
    for name, told in named:
        if told is not None:
            heading = f"<h3>{escape(name)}</h3>" if len(named) > 1 else ""
            text += f'{heading}{_finding(told)}<div class="panel wide">{_table(told)}</div>'
    return text


def _finding(told: Told) -> str:
    most, predicted = max(told.observed), max(each["peak"] for each in told.predicted)
    blocks = ""
    if told.ways and told.ways[0] and _alike(told):
        blocks = f" Of {sum(told.ways[0].values())} blocks {_say(told.ways[0])}."
    if not most:
        said = f"No step has told yet what it took; {binary_size(predicted)} were predicted."
    elif most <= told.budget:
        said = f"The budget of {binary_size(told.budget)} was kept: a worker took {binary_size(most)} at most, "
        said += f"{binary_size(predicted)} were predicted."
    else:
        said = f"The budget of {binary_size(told.budget)} was not kept: a worker took {binary_size(most)}, "
        said += f"{binary_size(predicted)} were predicted."
    look = "notable" if most > told.budget else "calm"
    return f'<p class="finding {look}">{escape(said + blocks)}</p>'


def _alike(told: Told) -> bool:
    """Stages of a pipeline choose each for itself."""
    return all(each == told.ways[0] for each in told.ways)


def _say(ways: Mapping[str, int]) -> str:
    return "; ".join(f"{count} {_WAYS.get(way, way)}" for way, count in ways.items())


def _table(told: Told) -> str:
    shown = [key for key in _PARTS if any(each[key] for each in told.predicted)]
    head = "".join(f"<th>{_PARTS[key]}</th>" for key in shown)
    apart = not _alike(told) and len(told.ways) == len(told.predicted)
    rows = ""
    for rank, each in enumerate(told.predicted):
        cells = "".join(f'<td class="value">{binary_size(each[key])}</td>' for key in shown)
        observed = binary_size(told.observed[rank]) if told.observed[rank] else "–"
        rows += f'<tr><th scope="row">rank {rank}</th>{cells}<td class="value">{observed}</td>'
        rows += f"<td>{escape(_say(told.ways[rank]))}</td></tr>" if apart else "</tr>"
    how = "counted by the allocator" if told.exact else "counted from the results of operations"
    return (
        f'<p class="note">Of a training step. Activations are gone when the update runs. Observed: {how}.</p>'
        f'<div class="scroll"><table class="settings"><thead><tr><th></th>{head}<th>observed peak</th>'
        f"{'<th>blocks</th>' if apart else ''}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
