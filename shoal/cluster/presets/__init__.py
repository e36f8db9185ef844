"""Machines that many have, each a TOML file of this folder that names its sources, as Topologies.

Rates are the wire's: collectives reach 75 to 95 % of them. Where links meet in a switch, a GPU's ports are capacities
that all its links share. Latencies are those of a pipelined copy (NCCL's Simple protocol), which moves long messages.
"""

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files

from shoal.cluster.topology import Capacity, Link, Topology
from shoal.errors import UserError, unknown_name
from shoal.recipe.typed import from_mapping


@dataclass(frozen=True, kw_only=True)
class NvLinks:
    bytes_per_s: float  # of one link, one direction
    latency_s: float
    pairs: tuple[tuple[int, int, int], ...] = ()  # (gpu, gpu, links between them)
    to_switch: int = 0  # links of each GPU into switches that join all


@dataclass(frozen=True, kw_only=True)
class Pcie:
    bytes_per_s: float  # of one x16 port, one direction
    latency_s: float
    switches: tuple[tuple[int, ...], ...]  # the GPUs below each
    sockets: tuple[tuple[int, ...], ...] = ()  # the switches below each processor; () when the way between is no limit
    between_sockets_bytes_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Network:
    bytes_per_s: float  # of one card, one direction
    latency_s: float
    cards: tuple[tuple[int, ...], ...]  # the GPUs that share each


@dataclass(frozen=True, kw_only=True)
class Node:
    """A preset as its file says it."""

    title: str
    gpus: int
    nvlink: NvLinks
    pcie: Pcie
    network: Network
    sources: tuple[str, ...] = field(default=())

    def nvlinks(self, a: int, b: int) -> int:
        """Links between two GPUs; with switches, those of each."""
        return self.nvlink.to_switch or next((n for x, y, n in self.nvlink.pairs if {x, y} == {a, b}), 0)


def names() -> list[str]:
    return sorted(entry.name.removesuffix(".toml") for entry in files(__name__).iterdir() if entry.name[-5:] == ".toml")


def node(name: str) -> Node:
    """Raises UserError with the nearest name when there is none."""
    if name not in names():
        raise unknown_name("topology preset", name, names())
    text = files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return from_mapping(Node, tomllib.loads(text), f"preset {name}")


def topology(name: str, gpus: Iterable[int] | None = None, nodes: int = 1) -> Topology:
    """``nodes`` such machines with the GPUs ``gpus`` of each (all); ranks go node by node, in the order of ``gpus``.

    Lane 0 is NVLink inside of a node and the network between nodes; lane 1 is PCIe. Raises UserError with the nearest
    name, or for GPUs that the machine does not have."""
    made = node(name)
    chosen = list(range(made.gpus)) if gpus is None else list(gpus)
    if nodes < 1 or not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(made.gpus)):
        raise UserError(
            f"preset {name}: needs at least 1 node and GPUs from 0 to {made.gpus - 1}, each once: {chosen}."
        )
    owners = [(host, gpu) for host in range(nodes) for gpu in chosen]
    links: list[Link] = []
    shared: dict[str, float] = {}
    for source, here in enumerate(owners):
        for target, there in enumerate(owners):
            if source != target:
                for link, rates in _between(made, source, here, target, there):
                    links.append(link)
                    shared |= rates
    return Topology(
        name=name
        + (f"[{','.join(map(str, chosen))}]" if len(chosen) < made.gpus else "")
        + (f" x{nodes}" if nodes > 1 else ""),
        hosts=tuple(f"node{host}" for host, _ in owners),
        links=tuple(links),
        capacities=tuple(Capacity(name=name, bytes_per_s=rate) for name, rate in shared.items()),
    )


Place = tuple[int, int]  # node, GPU


def _between(
    made: Node, source: int, here: Place, target: int, there: Place
) -> Iterator[tuple[Link, dict[str, float]]]:
    """The links from one GPU to another, each with the rates of the capacities that it goes through."""
    (host, a), (other, b) = here, there
    if host != other:
        network, ends = made.network, {
            f"node{host}:nic{_group(made.network.cards, a)}:out": made.network.bytes_per_s,
            f"node{other}:nic{_group(made.network.cards, b)}:in": made.network.bytes_per_s,
        }  # fmt: skip
        yield _link(source, target, "network", 0, network.bytes_per_s, network.latency_s, ends), ends
        return
    fast, count = made.nvlink, made.nvlinks(a, b)
    if count:
        rate = count * fast.bytes_per_s
        ports = {f"node{host}:gpu{a}:nvlink:out": rate, f"node{host}:gpu{b}:nvlink:in": rate} if fast.to_switch else {}
        yield _link(source, target, "nvlink", 0, rate, fast.latency_s, ports), ports
    ways = _pcie_ways(made.pcie, host, a, b)
    yield _link(source, target, "pcie", 1, min(ways.values()), made.pcie.latency_s, ways), ways


def _pcie_ways(pcie: Pcie, host: int, a: int, b: int) -> dict[str, float]:
    up, down, rate = _group(pcie.switches, a), _group(pcie.switches, b), pcie.bytes_per_s
    ways = {f"node{host}:gpu{a}:pcie:out": rate, f"node{host}:gpu{b}:pcie:in": rate}
    if up != down:
        ways |= {f"node{host}:switch{up}:out": rate, f"node{host}:switch{down}:in": rate}
    if pcie.sockets:
        one, two = _group(pcie.sockets, up), _group(pcie.sockets, down)
        if one != two:
            ways[f"node{host}:socket{one}:out"] = pcie.between_sockets_bytes_per_s
    return ways


def _group(groups: Iterable[Iterable[int]], member: int) -> int:
    return next(number for number, group in enumerate(groups) if member in group)


def _link(
    source: int, target: int, kind: str, lane: int, rate: float, latency_s: float, through: dict[str, float]
) -> Link:
    return Link(source=source, target=target, kind=kind, lane=lane, bytes_per_s=rate, latency_s=latency_s,
                through=tuple(through))  # fmt: skip
