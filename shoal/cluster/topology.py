"""The Topology: ranks, the hosts they run on, and the directed links between them. Pure data.

A message of B bytes over a link takes ``latency_s + B / bytes_per_s``. Links may pass through shared capacities (a
network card, a PCIe switch, the processor of a host whose messages are copied by it): what crosses a capacity at the
same time divides its rate. A *lane* is one of several ways between the same two ranks, such as NVLink (0) and PCIe (1).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from shoal.cluster.cluster import Cluster
from shoal.errors import UserError, unknown_name
from shoal.recipe.typed import from_mapping, read_toml, to_mapping, to_toml


@dataclass(frozen=True, kw_only=True)
class Link:
    """One way, one direction."""

    source: int  # rank
    target: int  # rank
    bytes_per_s: float
    latency_s: float = 0.0
    kind: str = "link"  # "nvlink", "pcie", "ethernet", "memory", ...
    lane: int = 0
    through: tuple[str, ...] = ()  # names of the capacities that its bytes cross

    def __post_init__(self) -> None:
        where = f"topology: link {self.source} -> {self.target} ({self.kind})"
        if self.source == self.target or min(self.source, self.target) < 0:
            raise UserError(f"{where} must join two ranks.")
        if not self.bytes_per_s > 0 or not self.latency_s >= 0 or self.lane < 0:
            raise UserError(f"{where} needs bytes_per_s above 0, latency_s and lane of at least 0.")


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What several links share."""

    name: str
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise UserError(f"topology: capacity {self.name!r} needs bytes_per_s above 0, got {self.bytes_per_s}.")


@dataclass(frozen=True, kw_only=True)
class Topology:
    hosts: tuple[str, ...]  # name of the host of each rank
    links: tuple[Link, ...] = ()
    capacities: tuple[Capacity, ...] = ()
    name: str = ""
    message_s: float = 0.0  # processor time of a message at its sender, and again at its receiver, whatever its size
    reduce_s_per_byte: float = 0.0  # time to add one received byte to what is there
    copy_s_per_byte: float = 0.0  # time to copy one byte inside a rank
    cores: Mapping[str, int] = field(default_factory=dict)  # of each host; a host that is not named has enough

    def __post_init__(self) -> None:
        if not self.hosts:
            raise UserError("topology: it has no ranks.")
        known = {capacity.name for capacity in self.capacities}
        if len(known) < len(self.capacities):
            raise UserError("topology: two capacities have the same name.")
        seen: set[tuple[int, int, int]] = set()
        for link in self.links:
            if max(link.source, link.target) >= self.size:
                raise UserError(f"topology: link {link.source} -> {link.target} ends outside of {self.size} ranks.")
            for name in link.through:
                if name not in known:
                    raise unknown_name("capacity", name, known, f"topology link {link.source} -> {link.target}")
            key = (link.source, link.target, link.lane)
            if key in seen:
                raise UserError(f"topology: two links {link.source} -> {link.target} on lane {link.lane}.")
            seen.add(key)
        for host in self.cores:
            if host not in self.hosts:
                raise unknown_name("host", host, set(self.hosts), "topology cores")

    @cached_property
    def _hash(self) -> int:
        return hash((self.hosts, self.links, self.capacities, self.name))

    def __hash__(self) -> int:
        return self._hash

    @property
    def size(self) -> int:
        return len(self.hosts)

    @cached_property
    def _ways(self) -> dict[tuple[int, int], list[Link]]:
        ways: dict[tuple[int, int], list[Link]] = {}
        for link in sorted(self.links, key=lambda link: link.lane):
            ways.setdefault((link.source, link.target), []).append(link)
        return ways

    @cached_property
    def rates(self) -> dict[str, float]:
        """Bytes a second of each capacity."""
        return {capacity.name: capacity.bytes_per_s for capacity in self.capacities}

    @property
    def lanes(self) -> int:
        return 1 + max((link.lane for link in self.links), default=0)

    @property
    def host_names(self) -> tuple[str, ...]:
        """Each host once, in order of its first rank."""
        return tuple(dict.fromkeys(self.hosts))

    def ranks_of(self, host: str) -> tuple[int, ...]:
        """Raises UserError with the nearest name when no rank runs there."""
        if host not in self.hosts:
            raise unknown_name("host", host, set(self.hosts), f"topology {self.name!r}" if self.name else "topology")
        return tuple(rank for rank, name in enumerate(self.hosts) if name == host)

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each host, hosts in order of their first rank."""
        return tuple(self.ranks_of(host) for host in self.host_names)

    def between(self, source: int, target: int) -> tuple[Link, ...]:
        """All links from one rank to another, by lane; none is an empty tuple."""
        return tuple(self._ways.get((source, target), ()))

    def link(self, source: int, target: int, lane: int = 0) -> Link:
        """The link of that lane; for lane 0 the first there is, so that ranks without NVLink still meet over PCIe.

        Raises UserError when there is none."""
        ways = self._ways.get((source, target), [])
        for way in ways:
            if way.lane == lane or lane == 0:
                return way
        lanes = ", ".join(f"{way.lane} ({way.kind})" for way in ways) or "none"
        raise UserError(f"topology: no link from rank {source} to rank {target} on lane {lane}; lanes there: {lanes}.")

    def lane_of(self, kind: str) -> int:
        """The lane of a kind of link. Raises UserError with the nearest kind when there is none."""
        lanes = {link.kind: link.lane for link in reversed(self.links)}
        if kind not in lanes:
            raise unknown_name("kind of link", kind, lanes, f"topology {self.name!r}" if self.name else "topology")
        return lanes[kind]

    def only(self, keep: Callable[[Link], bool]) -> "Topology":
        """The same ranks with the links for which ``keep`` is true, and what those share."""
        links = tuple(link for link in self.links if keep(link))
        return replace(self, links=links, capacities=self._crossed(links))

    def _crossed(self, links: Iterable[Link]) -> tuple[Capacity, ...]:
        names = {name for link in links for name in link.through}
        return tuple(capacity for capacity in self.capacities if capacity.name in names)

    def subset(self, ranks: Sequence[int]) -> "Topology":
        """Some of the ranks, numbered anew in the order given. Raises UserError for one that is not there, or twice."""
        for rank in ranks:
            if not 0 <= rank < self.size or list(ranks).count(rank) > 1:
                raise UserError(f"topology: rank {rank} of {list(ranks)} must be one of 0 to {self.size - 1}, once.")
        new = {old: position for position, old in enumerate(ranks)}
        links = tuple(
            replace(link, source=new[link.source], target=new[link.target])
            for link in self.links
            if link.source in new and link.target in new
        )
        hosts = tuple(self.hosts[rank] for rank in ranks)
        return replace(
            self,
            hosts=hosts,
            links=links,
            capacities=self._crossed(links),
            cores={host: count for host, count in self.cores.items() if host in hosts},
            name=f"{self.name}[{','.join(map(str, ranks))}]" if self.name else "",
        )

    # ---- text

    def to_json(self) -> str:
        return json.dumps(to_mapping(self), indent=1)

    def to_toml(self) -> str:
        return to_toml(self)

    def save(self, path: str | Path) -> None:
        """As JSON or TOML, by the end of the name."""
        path = Path(path)
        path.write_text(self.to_toml() if path.suffix == ".toml" else self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "Topology":
        """From JSON or TOML, by the end of the name. Raises UserError naming the file and what is wrong in it."""
        path = Path(path)
        return from_mapping(Topology, read_toml(path) if path.suffix == ".toml" else read_json(path), str(path))

    @staticmethod
    def from_json(text: str) -> "Topology":
        return from_mapping(Topology, _parse_json(text, "topology"), "topology")

    def __str__(self) -> str:
        from shoal.cluster.topology_table import table

        return table(self)

    # ---- where they come from

    @staticmethod
    def from_cluster(
        cluster: Cluster, ranks: int | Sequence[int] | None = None, inside: "Speed | None" = None
    ) -> "Topology":
        """Ranks of a Cluster's hosts: ``ranks`` of each host (one number for all, or one a host); left out, one an
        accelerator, or one for a host that has none.

        Ranks of one host meet through its memory, at the Cluster's own ``memory`` link of that host or, where it names
        none, at ``inside``. A Cluster's links between hosts are lanes, in its order; all ranks of a host share them."""
        counts = [ranks] * len(cluster.hosts) if isinstance(ranks, int) else list(ranks or ())
        if ranks is None:
            counts = [max(1, len(host.devices)) for host in cluster.hosts]
        if len(counts) != len(cluster.hosts) or min(counts) < 1:
            raise UserError(f"topology: ranks must be at least 1 for each of {len(cluster.hosts)} hosts, got {counts}.")
        owner = [host.name for host, count in zip(cluster.hosts, counts, strict=True) for _ in range(count)]
        memory = {end: Speed(link.bytes_per_s, link.latency_s) for link in cluster.links for end in link.between[:1]
                  if link.kind == MEMORY and len(set(link.between)) == 1}  # fmt: skip
        networks = [link for link in cluster.links if link.kind != MEMORY]
        links: list[Link] = []
        shared: dict[str, float] = {}
        for source, target in _pairs(len(owner)):
            here, there = owner[source], owner[target]
            if here == there:
                speed = memory.get(here, inside or UNMEASURED_MEMORY)
                links.append(_at(speed, source, target, kind=MEMORY))
                continue
            joined = [wire for wire in networks if not wire.between or {here, there} <= set(wire.between)]
            for lane, wire in enumerate(joined):
                ends = (f"{here}:{wire.kind}{lane}:out", f"{there}:{wire.kind}{lane}:in")
                shared |= dict.fromkeys(ends, wire.bytes_per_s)
                speed = Speed(wire.bytes_per_s, wire.latency_s)
                links.append(_at(speed, source, target, kind=wire.kind, lane=lane, through=ends))
        return Topology(
            hosts=tuple(owner),
            links=tuple(links),
            capacities=tuple(Capacity(name=name, bytes_per_s=rate) for name, rate in shared.items()),
            cores={host.name: host.cores for host in cluster.hosts},
        )

    @staticmethod
    def preset(name: str, gpus: Iterable[int] | None = None, nodes: int = 1) -> "Topology":
        """A machine that many have: see ``shoal.cluster.presets``. ``gpus`` are those that a job got of each node."""
        from shoal.cluster import presets

        return presets.topology(name, gpus, nodes)

    @staticmethod
    def synthetic(
        ranks: int, *, hosts: int = 1, inside: "Speed | None" = None, between: Sequence["Speed"] = (), name: str = ""
    ) -> "Topology":
        """``ranks`` spread evenly over ``hosts`` (blocks of neighbours), every pair joined: for tests and questions.

        ``between`` holds the speed of each network interface of a host, one a lane, which its ranks share."""
        if ranks < 1 or not 1 <= hosts <= ranks:
            raise UserError(f"topology: cannot spread {ranks} ranks over {hosts} hosts.")
        from shoal.cluster.cluster import Host
        from shoal.cluster.cluster import Link as Joint

        fill = [ranks // hosts + (host < ranks % hosts) for host in range(hosts)]
        machines = tuple(Host(name=f"h{host}", cores=count, memory_bytes=1) for host, count in enumerate(fill))
        wires = tuple(Joint(kind=NETWORK, bytes_per_s=s.bytes_per_s, latency_s=s.latency_s)
                      for s in between or (Speed(1e9, 50e-6),))  # fmt: skip
        made = Topology.from_cluster(Cluster(hosts=machines, links=wires), fill, inside)
        return replace(made, name=name or f"{ranks} ranks on {hosts} hosts", cores={})


@dataclass(frozen=True)
class Speed:
    bytes_per_s: float
    latency_s: float = 0.0


MEMORY, NETWORK = "memory", "network"
UNMEASURED_MEMORY = Speed(1e9, 50e-6)  # loopback TCP between two processes, by order of magnitude: probe for the truth


def _at(speed: Speed, source: int, target: int, **rest: Any) -> Link:
    return Link(source=source, target=target, bytes_per_s=speed.bytes_per_s, latency_s=speed.latency_s, **rest)


def _pairs(size: int) -> list[tuple[int, int]]:
    return [(source, target) for source in range(size) for target in range(size) if source != target]


def read_json(path: Path) -> Any:
    try:
        return _parse_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"no file {str(path)!r}: check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}.") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}.") from None
