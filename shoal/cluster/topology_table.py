"""A Topology as text: its hosts, a matrix of rates, its kinds of link."""

import re

from shoal.cluster.topology import Link, Topology

WIDEST = 16  # ranks that a matrix of a screen's width shows


def table(topology: Topology) -> str:
    hosts = topology.host_names
    lines = [
        f"{topology.name or 'topology'}: {topology.size} ranks on {len(hosts)} host{'s' if len(hosts) > 1 else ''}"
    ]
    for host in hosts:
        cores = f", {topology.cores[host]} cores" if host in topology.cores else ""
        lines.append(f"  {host}: ranks {_runs(topology.ranks_of(host))}{cores}")
    kinds: dict[tuple[int, str], list[Link]] = {}
    for link in topology.links:
        kinds.setdefault((link.lane, link.kind), []).append(link)
    for (lane, kind), links in sorted(kinds.items()):
        lines.append(f"  lane {lane} {kind}: {len(links)} links, {_span(links)}")
        if topology.size <= WIDEST:
            lines += ["    " + line for line in _matrix(topology.size, links)]
    alike: dict[tuple[str, float], list[str]] = {}
    for name, rate in topology.rates.items():
        alike.setdefault((re.sub(r"\d+", "*", name), rate), []).append(name)
    for (pattern, rate), names in alike.items():
        name = names[0] if len(names) == 1 else f"{pattern}, {len(names)} of them"
        lines.append(f"  shared {name}: {rate / 1e9:.3g} GB/s")
    return "\n".join(lines)


def _span(links: list[Link]) -> str:
    rates, waits = [link.bytes_per_s / 1e9 for link in links], [link.latency_s * 1e6 for link in links]
    return f"{_between(min(rates), max(rates))} GB/s, {_between(min(waits), max(waits))} us"


def _between(low: float, high: float) -> str:
    texts = f"{low:.3g}", f"{high:.3g}"
    return texts[0] if texts[0] == texts[1] else "-".join(texts)


def _matrix(size: int, links: list[Link]) -> list[str]:
    """Rows are senders, columns receivers, GB/s."""
    cells = {(link.source, link.target): f"{link.bytes_per_s / 1e9:.3g}" for link in links}
    width = max(3, *(len(cell) for cell in cells.values())) + 1
    lines = ["GB/s" + "".join(f"{rank:>{width}}" for rank in range(size))]
    for source in range(size):
        row = "".join(
            f"{'.' if source == target else cells.get((source, target), '-'):>{width}}" for target in range(size)
        )
        lines.append(f"{source:>4}{row}")
    return lines


def _runs(ranks: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` -> ``0-2, 5``."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
