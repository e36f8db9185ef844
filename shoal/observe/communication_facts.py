"""What a report says of communication, as plain values for --json and as lines for a terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from shoal.comm.accounting.counters import Kind
from shoal.comm.accounting.remedies import Remedy, remedies, ways
from shoal.observe.bottleneck import bottleneck, evidence
from shoal.observe.communication import Communication, read_communication
from shoal.observe.units import duration, share
from shoal.run.run import Run

SHOWN_REMEDIES = 2


def facts(c: Communication) -> dict[str, Any]:
    """Seconds and bytes of the mean worker in a step, where nothing else is said."""
    return {
        "workers": c.workers,
        "servers": c.servers,
        "steps": c.steps,
        "step_s": c.step_s,
        "hidden_s": c.hidden_s,
        "exposed_s": c.exposed_s,
        "bottleneck": asdict(bottleneck(c)),
        "spent": dict(evidence(c)),
        "remedies": [asdict(remedy) for remedy in known_remedies(c)],
        "operations": [
            {
                "operation": operation,
                "link": link,
                "calls": fmean(each.calls for each in of),
                "sent_bytes": fmean(each.sent_bytes for each in of),
                "received_bytes": fmean(each.received_bytes for each in of),
                "hidden_s": fmean(each.hidden_s for each in of),
                "exposed_s": fmean(each.exposed_s for each in of),
                "spent_s": {kind.name: fmean(each.spent(kind) for each in of) for kind in Kind},
            }
            for (operation, link), of in c.flows.items()
        ],
        "waits_s": c.waits,
        "ways": [] if c.mesh else [asdict(way) for way in ways(c.measured)],
    }


def known_remedies(c: Communication) -> tuple[Remedy, ...]:
    """None for a split model: the predictions are of whole gradients, summed by all workers."""
    return () if c.mesh else remedies(c.measured)


def of_runs(runs: Sequence[Run]) -> list[Communication | None]:
    return [read_communication(run.events()) for run in runs]


def lines(c: Communication) -> list[str]:
    """The finding, and the remedies that would gain most."""
    notable = [remedy for remedy in known_remedies(c) if remedy.gain_s >= 0.01 * c.step_s][:SHOWN_REMEDIES]
    helps = "; ".join(
        f"{r.name} ({r.how}): {duration(r.gain_s)}, {share(r.gain_s / c.step_s)} of a step" for r in notable
    )
    return [bottleneck(c).sentence, *([f"would help: {helps}"] if helps else [])]
