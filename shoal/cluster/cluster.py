"""The Cluster: hosts, their devices and memories, and the links between them. Pure data."""

from dataclasses import dataclass
from pathlib import Path

from shoal.errors import UserError
from shoal.recipe.typed import from_mapping, read_toml, to_toml


@dataclass(frozen=True, kw_only=True)
class Device:
    kind: str  # "cuda", "xpu", "mps", ...: torch's name for the type
    memory_bytes: int
    name: str = ""  # as the maker calls it


@dataclass(frozen=True, kw_only=True)
class Host:
    name: str
    cores: int  # usable by one process tree: affinity and quota count, not what is soldered in
    memory_bytes: int
    devices: tuple[Device, ...] = ()

    def __post_init__(self) -> None:
        if self.cores < 1:
            raise UserError(f"cluster: host {self.name!r} must have at least 1 core, got {self.cores}.")


@dataclass(frozen=True, kw_only=True)
class Link:
    kind: str  # "ethernet", "nvlink", "pcie", ...
    bytes_per_s: float  # in one direction
    latency_s: float = 0.0
    between: tuple[str, ...] = ()  # names of the hosts that it joins; () joins all of them

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.latency_s < 0:
            raise UserError(f"cluster: link {self.kind!r} needs bytes_per_s above 0 and latency_s of at least 0.")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    hosts: tuple[Host, ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        names = [host.name for host in self.hosts]
        if not names:
            raise UserError("cluster: it has no hosts.")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"cluster: two hosts are called {twice!r}.")
        for link in self.links:
            for end in link.between:
                if end not in names:
                    raise UserError(f"cluster: link {link.kind!r} ends at {end!r}, which is no host of it.")

    @property
    def cores(self) -> int:
        return sum(host.cores for host in self.hosts)

    @staticmethod
    def from_toml(path: str | Path) -> "Cluster":
        """Raises UserError naming the file and the key."""
        return from_mapping(Cluster, read_toml(Path(path)), str(path))

    def to_toml(self) -> str:
        return to_toml(self)

    @staticmethod
    def detect() -> "Cluster":
        """This machine alone, with its accelerators."""
        from shoal.cluster.detect import this_host

        return Cluster(hosts=(this_host(accelerators=True),))

    def __str__(self) -> str:
        lines = []
        for host in self.hosts:
            lines.append(f"{host.name}: {counted(host.cores, 'core')}, {gibibytes(host.memory_bytes)}")
            for device in host.devices:
                lines.append(f"  {device.kind} {device.name}, {gibibytes(device.memory_bytes)}")
        for link in self.links:
            ends = " - ".join(link.between) or "all hosts"
            lines.append(f"{link.kind} {ends}: {link.bytes_per_s / 1e9:.3g} GB/s, {link.latency_s * 1e6:.3g} us")
        return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
