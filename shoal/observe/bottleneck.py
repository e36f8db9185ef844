"""What holds a run up, named in one plain sentence, with the numbers that say so. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from shoal.comm.accounting.counters import Kind
from shoal.comm.stages.messages import RECEIVE
from shoal.observe.communication import Communication
from shoal.observe.units import duration, share, size

NOTABLE = 0.05  # of a step: below it, a loss is not worth a name
BLAME = 0.6  # the share of all waiting that makes those who were waited for stragglers, not workers who take turns


@dataclass(frozen=True)
class Bottleneck:
    kind: str  # compute, loading, loader, straggler, turns, stages, bandwidth, latency, reducing, server
    sentence: str
    loss_s: float  # seconds a step that the mean worker loses by it
    share: float  # of the step
    ranks: tuple[int, ...] = ()  # who, where it is somebody


def bottleneck(c: Communication) -> Bottleneck:
    """The largest loss of the mean worker, if it is notable; else computing, which is what the time is for."""
    losses = [_waiting(c), _server(c), _transfer(c), _reducing(c), _loading(c)]
    largest = max((loss for loss in losses if loss), key=lambda loss: loss.loss_s, default=None)
    return largest if largest and largest.share >= NOTABLE else _computing(c)


def _named(c: Communication, kind: str, loss_s: float, sentence: str, ranks: Sequence[int] = ()) -> Bottleneck:
    return Bottleneck(kind, sentence, loss_s, loss_s / c.step_s if c.step_s > 0 else 0.0, tuple(ranks))


def _of_step(c: Communication, seconds: float) -> str:
    return f"{duration(seconds)} ({share(seconds / c.step_s) if c.step_s > 0 else '–'})"


def _computing(c: Communication) -> Bottleneck:
    work = fmean(c.compute)
    exposed = c.exposed_s
    text = (
        f"Computing takes {share(work / c.step_s)} of a step and is what limits it: for communication the workers "
        f"stand still {_of_step(c, exposed)}."
    )
    return _named(c, "compute", work, text)


def blamed(c: Communication) -> list[float]:
    """Seconds a step that the mean worker stood still for each worker."""
    return [sum(row[rank] for row in c.waits) / c.workers for rank in range(c.workers)]


def stragglers(blame: Sequence[float]) -> list[int]:
    """The fewest workers who are to blame for most of the waiting; [] when it takes too many to be a few."""
    whole = sum(blame)
    order = sorted(range(len(blame)), key=lambda rank: (-blame[rank], rank))
    for count in range(1, max(1, len(blame) // 3) + 1):
        if whole > 0 and sum(blame[rank] for rank in order[:count]) >= BLAME * whole:
            return sorted(order[:count])
    return []


def _waiting(c: Communication) -> Bottleneck | None:
    blame = blamed(c)
    lost = sum(blame)
    if lost <= 0:
        return None
    late = stragglers(blame)
    for_stages = sum(
        fmean(each.exposed[Kind.waiting] for each in of) for (op, _), of in c.flows.items() if op == RECEIVE
    )
    of_pipeline = _named(
        c,
        "stages",
        lost,
        f"The stages wait for each other’s messages, {_of_step(c, for_stages)} of each step: the pipeline fills and "
        f"empties, or its stages take unlike times. The section on the pipeline tells the two apart.",
    )
    if not late and for_stages >= BLAME * lost:
        return of_pipeline
    if not late:
        text = (
            f"The workers wait for each other in turns, {_of_step(c, lost)} of each step, and none is to blame: "
            f"their passes take now longer, now shorter, as on shared cores or with batches of unlike size."
        )
        return _named(c, "turns", lost, text)
    names = _ranks(late)
    others = [rank for rank in range(c.workers) if rank not in late]
    stood = fmean(sum(c.waits[rank][peer] for peer in late) for rank in others)
    excess = {
        cause: fmean(_spent_on(c, cause)[rank] for rank in late) - median(_spent_on(c, cause)[rank] for rank in others)
        for cause in ("computing", "loading", "updating")
    }
    cause = max(excess, key=lambda cause: excess[cause])
    head = f"The others stand still {_of_step(c, stood)} of each step for {names}"
    it, its, s = ("they", "their", "") if len(late) > 1 else ("it", "its", "s")
    slow, usual = _against(_spent_on(c, cause), late, others)
    if excess[cause] <= 0 and for_stages >= BLAME * lost:
        return of_pipeline
    if excess[cause] <= 0:
        return _named(c, "straggler", lost, f"{head}, whose own work takes no longer than theirs.", late)
    if cause == "loading":
        text = f"The data of {names} comes late: t{head[1:]}, which wait{s} {slow} for {its} batches where the others "
        return _named(c, "loader", lost, f"{text}wait {usual}.", late)
    if cause == "computing":
        owned, whole = sum(c.placement[rank] for rank in late), sum(c.placement)
        shards = f", and {it} own{s} {owned} of {whole} shards" if _more_shards(c, late, others) else ""
        text = (
            f"{head}: {it} need{s} {slow} for {its} forward and backward passes where the others need {usual}{shards}"
        )
        return _named(c, "straggler", lost, f"{text}.", late)
    text = f"{head}, late from {its} update and what follows it: {slow} where the others need {usual}"
    return _named(c, "straggler", lost, f"{text}.", late)


def _spent_on(c: Communication, cause: str) -> tuple[float, ...]:
    return {"loading": c.phase("loading"), "computing": c.compute, "updating": c.phase("updating")}[cause]


def _more_shards(c: Communication, late: Sequence[int], others: Sequence[int]) -> bool:
    return min(c.placement[rank] for rank in late) > max(c.placement[rank] for rank in others)


def _against(values: Sequence[float], late: Sequence[int], others: Sequence[int]) -> tuple[str, str]:
    return duration(fmean(values[rank] for rank in late)), duration(median(values[rank] for rank in others))


def _ranks(ranks: Sequence[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def _server(c: Communication) -> Bottleneck | None:
    blame = [fmean(row[peer] for row in c.waits) for peer in range(c.workers, len(c.waits[0]))]
    lost = sum(blame)
    if lost <= 0:
        return None
    worst = max(range(len(blame)), key=blame.__getitem__)
    uneven = len(blame) > 1 and blame[worst] >= BLAME * lost
    who = f"server {worst}" if uneven else "the server" if len(blame) == 1 else f"the {len(blame)} servers"
    text = f"The workers stand still {_of_step(c, lost)} of each step until {who} can answer"
    return _named(c, "server", lost, f"{text}.", (worst,) if uneven else ())


def _transfer(c: Communication) -> Bottleneck | None:
    lost = c.exposed(Kind.transferring)
    if c.mesh and lost > 0:
        (operation, link), most = max(
            ((place, fmean(each.exposed[Kind.transferring] for each in of)) for place, of in c.flows.items()),
            key=lambda found: found[1],
        )
        text = (
            f"The workers stand still {_of_step(c, lost)} of each step for transfers, {duration(most)} of it in "
            f"{operation} over {link}"
        )
        return _named(c, "bandwidth", lost, f"{text}.")
    m = c.measured
    if lost <= 0 or m.spent_s <= 0:
        return None
    link = str(c.transport.get("link", "the link"))
    if c.algorithm == "memory":
        text = (
            f"Waking up takes {_of_step(c, lost)} of each step: news between workers who share memory is late by that "
            f"much, as when there are more workers than free cores"
        )
        return _named(c, "latency", lost, f"{text}.")
    if c.algorithm == "server":
        servers = "the server has" if c.servers == 1 else f"the {c.servers} servers have"
        text = (
            f"The workers stand still {_of_step(c, lost)} of each step until {servers} taken {size(c.sent_bytes)} of "
            f"gradients from each, and given the new weights"
        )
        return _named(c, "server", lost, f"{text}.")
    if m.latency_s > m.bytes_s:
        text = (
            f"Start costs take most of the {_of_step(c, lost)} that the workers stand still for transfers: "
            f"{c.operations:.0f} operations a step carry {size(c.sent_bytes / max(1.0, c.operations))} each, and each "
            f"needs {duration(m.latency_s / max(1.0, c.operations))} however small it is"
        )
        return _named(c, "latency", lost, f"{text}.")
    rate = c.sent_bytes / m.bytes_s if m.bytes_s > 0 else 0.0
    text = (
        f"The link is what limits the run: each worker sends {size(c.sent_bytes)} a step over {link}, "
        f"at {size(rate)}/s, and stands still {_of_step(c, lost)} for it"
    )
    return _named(c, "bandwidth", lost, f"{text}.")


def _reducing(c: Communication) -> Bottleneck | None:
    lost = c.exposed(Kind.reducing)
    if lost <= 0:
        return None
    text = f"Adding up gradients after the backward pass takes {_of_step(c, lost)} of each step"
    return _named(c, "reducing", lost, f"{text}.")


def _loading(c: Communication) -> Bottleneck | None:
    """Data that is late on all workers; a single one's shows as waiting for it."""
    lost = min(c.phase("loading"), default=0.0)
    if lost <= 0:
        return None
    text = f"Data comes late on every worker: {_of_step(c, lost)} of each step goes by without a batch"
    return _named(c, "loading", lost, f"{text}.")


EVIDENCE: tuple[tuple[str, Callable[[Communication], float]], ...] = (
    ("computing", lambda c: fmean(c.compute)),
    ("loading", lambda c: fmean(c.phase("loading"))),
    ("waiting for late workers", lambda c: sum(blamed(c))),
    ("transferring", lambda c: c.exposed(Kind.transferring)),
    ("reducing", lambda c: c.exposed(Kind.reducing)),
    ("hidden communication", lambda c: c.hidden_s),
)


def evidence(c: Communication) -> list[tuple[str, float]]:
    """(what, seconds a step of the mean worker): where the time of a step goes."""
    return [(name, value(c)) for name, value in EVIDENCE]
