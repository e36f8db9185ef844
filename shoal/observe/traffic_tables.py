"""Tables about communication, as HTML: remedies, operations, who waits for whom, other ways to do the same."""

from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean

from shoal.comm.accounting.counters import Kind, Total
from shoal.comm.accounting.remedies import CODEC_BYTES_PER_S, Remedy, Way, remedies, ways
from shoal.observe.bottleneck import evidence
from shoal.observe.communication import Communication
from shoal.observe.units import duration, share, size

MOST_PEERS = 16  # of a matrix; of more, the pairs that wait longest
PAIRS = 12
COLOURS = {
    "computing": "part-backward",
    "loading": "part-data",
    "waiting for late workers": "wait-skew",
    "transferring": "part-exchange",
    "reducing": "part-update",
    "hidden communication": "wait-hidden",
}


def time_of_a_step(c: Communication) -> str:
    """Where the time of a step of the mean worker goes, as bars."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><i class="{COLOURS[name]}" '
        f'style="width:{min(1.0, seconds / c.step_s) * 100:.1f}%"></i></td>'
        f"<td>{_or_dash(duration, seconds)}</td><td>{_or_dash(share, seconds / c.step_s)}</td></tr>"
        for name, seconds in evidence(c)
    )
    return f'<div class="scroll"><table class="numbers waits spent"><tbody>{rows}</tbody></table></div>'


def help_table(c: Communication) -> str:
    """What each remedy would gain; those without a gain in one line below."""
    found = remedies(c.measured)
    notable = [remedy for remedy in found if remedy.gain_s >= 0.0005 * c.step_s]
    rows = "".join(_remedy(remedy, c.step_s) for remedy in notable)
    head = "<thead><tr><th>change</th><th>saves a step</th><th></th><th>by</th></tr></thead>"
    table = f'<div class="scroll"><table class="numbers remedies">{head}<tbody>{rows}</tbody></table></div>'
    idle = ", ".join(escape(remedy.name) for remedy in found if remedy not in notable)
    note = f'<p class="note">Would gain nothing: {idle}.</p>' if idle else ""
    if any(remedy.name.startswith("compression") for remedy in notable):
        speed = size(CODEC_BYTES_PER_S)
        note += f'<p class="note">Compression changes the numbers; a core is taken to compress {speed} a second.</p>'
    return f"{table if rows else ''}{note}"


def _remedy(remedy: Remedy, step_s: float) -> str:
    why = f"<small>{escape(remedy.why)}</small>" if remedy.why else ""
    return (
        f'<tr data-remedy="{escape(remedy.name)}" data-gain="{remedy.gain_s!r}"><th scope="row">{escape(remedy.name)}'
        f"{why}</th><td>{duration(remedy.gain_s)}</td><td>{share(remedy.gain_s / step_s)}</td>"
        f'<td class="how">{escape(remedy.how)}</td></tr>'
    )


def operations(c: Communication) -> str:
    """Each operation over each link: count, bytes, time hidden and exposed, of the mean worker in a step."""
    kinds = [kind.name for kind in Kind]
    head = "".join(f"<th>{text}</th>" for text in ("calls", "sends", "receives", "hidden", "exposed", "of a step"))
    head = f"<thead><tr><th>operation</th><th>link</th>{head}"
    head += "".join(f'<th class="fine">{kind}</th>' for kind in kinds) + "</tr></thead>"
    flows = sorted(c.flows.items(), key=lambda flow: -fmean(of.exposed_s + of.hidden_s for of in flow[1]))
    rows = "".join(
        f'<tr data-operation="{escape(operation)}"><th scope="row">{escape(operation)}</th>'
        f'<td class="link">{escape(link)}</td>{_flow(c, of)}</tr>'
        for (operation, link), of in flows
    )
    rows += f'<tr class="sum"><th scope="row">all</th><td></td>{_flow(c, c.by_worker)}</tr>'
    return f'<div class="scroll"><table class="numbers traffic">{head}<tbody>{rows}</tbody></table></div>'


def _flow(c: Communication, of: Sequence[Total]) -> str:
    calls = fmean(each.calls for each in of)
    exposed = fmean(each.exposed_s for each in of)
    cells = [
        f"{calls:.3g}",
        _or_dash(size, fmean(each.sent_bytes for each in of)),
        _or_dash(size, fmean(each.received_bytes for each in of)),
        _or_dash(duration, fmean(each.hidden_s for each in of)),
        _or_dash(duration, exposed),
        share(exposed / c.step_s),
    ]
    fine = [_or_dash(duration, fmean(each.spent(kind) for each in of)) for kind in Kind]
    return "".join(f"<td>{cell}</td>" for cell in cells) + "".join(f'<td class="fine">{cell}</td>' for cell in fine)


def _or_dash(form: Callable[[float], str], value: float) -> str:
    return form(value) if value > 0 else "–"


def matrix(c: Communication) -> str:
    """Who stands still for whom, in a step; "" when nobody ever does."""
    most = max((value for row in c.waits for value in row), default=0.0)
    if most <= 0:
        return ""
    peers = range(len(c.waits[0]))
    if len(peers) > MOST_PEERS:
        return _pairs(c)
    head = "".join(f"<th>{escape(c.peer(peer))}</th>" for peer in peers)
    rows = ""
    for rank, row in enumerate(c.waits):
        moving = c.by_worker[rank].exposed[Kind.transferring]
        cells = "".join(
            '<td class="own">·</td>' if peer == rank else _wait_cell(value, most) for peer, value in enumerate(row)
        )
        rows += (
            f'<tr><th scope="row">rank {rank}</th>{cells}'
            f'<td class="sum">{_or_dash(duration, sum(row))}</td>'
            f'<td class="fine">{_or_dash(duration, moving)}</td></tr>'
        )
    head = f"<thead><tr><th>stands still for</th>{head}<th>skew</th><th class='fine'>transfer</th></tr></thead>"
    return f'<div class="scroll"><table class="numbers matrix">{head}<tbody>{rows}</tbody></table></div>'


def _wait_cell(value: float, most: float) -> str:
    depth = f' style="--depth:{value / most * 100:.0f}%"' if value > 0 else ""
    return f'<td class="heat"{depth} data-seconds="{value!r}">{duration(value) if value > 0 else "–"}</td>'


def _pairs(c: Communication) -> str:
    pairs = sorted(((v, rank, peer) for rank, row in enumerate(c.waits) for peer, v in enumerate(row)), reverse=True)
    rows = "".join(
        f'<tr><th scope="row">rank {rank}</th><td class="link">for {escape(c.peer(peer))}</td>'
        f"<td>{duration(value)}</td><td>{share(value / c.step_s)}</td></tr>"
        for value, rank, peer in pairs[:PAIRS]
        if value > 0
    )
    return f'<div class="scroll"><table class="numbers"><tbody>{rows}</tbody></table></div>'


def other_ways(c: Communication, others: Sequence[tuple[str, Communication]] = ()) -> str:
    """All-reduce beside parameter servers, predicted from this run; measured where one of the others did it so."""
    titles = ("", "worker sends", "server receives", "exposed", "a step", *(["measured"] if others else []))
    head = f"<thead><tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr></thead>"
    counts = {other.servers for _, other in others if other.servers}
    rows = "".join(_way(way, others) for way in ways(c.measured, sorted({1, 2, 4} | counts)))
    return f'<div class="scroll"><table class="numbers ways">{head}<tbody>{rows}</tbody></table></div>'


def _way(way: Way, others: Sequence[tuple[str, Communication]]) -> str:
    server = size(way.server_bytes) if way.server_bytes else "–"
    same = [(name, other) for name, other in others if other.servers == way.servers]
    texts = [f"{duration(other.exposed_s)} of {duration(other.step_s)} in {escape(name)}" for name, other in same]
    measured = f'<td class="fine">{"; ".join(texts) or "–"}</td>' if others else ""
    return (
        f'<tr data-way="{escape(way.name)}"><th scope="row">{escape(way.name)}</th><td>{size(way.worker_bytes)}</td>'
        f"<td>{server}</td><td>{duration(way.exposed_s)}</td><td>{duration(way.step_s)}</td>{measured}</tr>"
    )


def measured(told: Sequence[tuple[str, Communication]]) -> str:
    """Several runs side by side."""
    titles = ("gradients", "worker sends", "hidden", "exposed", "skew", "transfer", "a step")
    head = "".join(f"<th>{title}</th>" for title in titles)
    rows = ""
    for name, c in told:
        of = c.by_worker
        cells = [
            "–" if c.mesh else size(sum(c.bucket_bytes)),
            size(c.sent_bytes),
            duration(c.hidden_s),
            f"{duration(c.exposed_s)} · {share(c.exposed_s / c.step_s)}",
            duration(fmean(each.exposed[Kind.waiting] for each in of)),
            duration(fmean(each.exposed[Kind.transferring] for each in of)),
            duration(c.step_s),
        ]
        rows += (
            f'<tr data-run="{escape(name)}"><th scope="row">{escape(name)}</th>'
            + f'<td class="link">{escape(way_of(c))}</td>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    head = f"<thead><tr><th>run</th><th>way</th>{head}</tr></thead>"
    return f'<div class="scroll"><table class="numbers traffic">{head}<tbody>{rows}</tbody></table></div>'


def way_of(c: Communication) -> str:
    """How a run sums its gradients, in words, or splits its model."""
    link = str(c.transport.get("link", ""))
    if c.mesh:
        return " x ".join(f"{axis} {size}" for axis, size in c.mesh.items())
    if c.servers:
        return f"{c.servers} parameter server{'s' if c.servers > 1 else ''}, {link}"
    return f"{c.transport.get('operation', 'all-reduce')}, {link}"
