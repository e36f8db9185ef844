"""The sampled steps of a run as a trace: compute and buckets of every worker, from the event log."""

from pathlib import Path

from shoal.comm.accounting import chrome
from shoal.comm.accounting.counters import Span
from shoal.errors import UserError
from shoal.observe.communication import Communication, read_communication
from shoal.run.run import Run

GAP_S = 0.001  # between two sampled steps, which were apart in truth


def spans(c: Communication) -> dict[str, list[Span]]:
    """By worker; sampled steps stand one after the other."""
    out: dict[str, list[Span]] = {}
    begun = 0.0
    for sample in c.samples:
        for worker in sample.workers:
            row = out.setdefault(f"rank {worker.rank}", [])
            row.append(Span("step", f"step {sample.step}", begun + worker.begun, begun + worker.end))
            changes = [(name, begun + since) for name, since in worker.phases]
            row += chrome.phase_spans(changes, begun + worker.end)
            for number, b in enumerate(worker.buckets):
                moments = (begun + b.posted, begun + b.ready, begun + b.begun, begun + b.reduced)
                row += chrome.bucket_spans(number, moments, {"step": sample.step})
        begun += max(worker.end for worker in sample.workers) + GAP_S
    return out


def write(run: Run, path: Path) -> Path:
    """Raises UserError when the run's log holds no sampled step, or the file cannot be written."""
    c = read_communication(run.events())
    if c is None or not c.samples:
        raise UserError(f"the log of {str(run.path)!r} holds no sampled step: runs of several workers write them.")
    return chrome.write(spans(c), path)
