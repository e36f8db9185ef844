"""Which program a call runs: the algorithm that was named, or what the cost model picks on links that were measured."""

import hashlib
import socket
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from shoal.comm.accounting.counters import Counters, Tally
from shoal.comm.collectives import torch_own
from shoal.comm.collectives.actions import REDUCING, ROOTED, Program
from shoal.comm.collectives.agreeing import agree, announce, expect
from shoal.comm.collectives.execute import HALVES, carry_out
from shoal.comm.collectives.registry import ALGORITHMS, algorithms, build
from shoal.comm.transports.contract import Transport, drive
from shoal.comm.transports.counting import Counting
from shoal.comm.transports.torch_group import TorchGroup
from shoal.errors import UserError, unknown_name

if TYPE_CHECKING:
    from shoal.cluster.topology import Topology
    from shoal.comm.collectives.choose import Choice

    Links = Topology | Any | None  # what `shoal.comm.probe` returns has a topology

CHOSEN = ("packed_trees", "rings", "multipath")  # made of the links by `choose`: they have no place in the registry
_hosts_of: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()
_counters: WeakKeyDictionary[Any, Counters] = WeakKeyDictionary()
_probed: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class Call:
    """One call of a collective: the program is picked, then carried out."""

    def __init__(
        self,
        collective: str,
        transport: Transport,
        operand: Tensor | None,
        result: Tensor | None,
        nbytes: int,
        root: int = 0,
        target: int = 0,
    ) -> None:
        self.collective, self.transport, self.nbytes = collective, transport, nbytes
        self.operand, self.result, self.root, self.target = operand, result, root, target

    def run(
        self,
        algorithm: str,
        segments: int | None,
        topology: "Links",
        *,
        op: str = "sum",
        rounding: str = "once",
    ) -> None:
        if topology is not None:
            ranks = getattr(topology, "topology", topology).size
            if ranks != self.transport.size:
                raise UserError(
                    f"{self.collective}: the topology has {ranks} ranks, but the group has {self.transport.size}."
                )
        if isinstance(self.transport, TorchGroup):
            self._agree(self.transport, f"algorithm {algorithm}", op, rounding, segments)
        if algorithm in ALGORITHMS:
            program: Program | None = self.named(algorithm, segments, topology)
        elif self.transport.size == 1:
            if algorithm not in ("auto", *CHOSEN):
                raise unknown_name("algorithm", algorithm, self.known, self.collective)
            program = build(self.collective, "direct", 1)
        else:
            program = self.chosen(algorithm, segments, topology, op, rounding)
        with torch.no_grad():
            if program is None:
                assert isinstance(self.transport, TorchGroup)  # only the measured curves of a group lead here
                torch_own.run(self.collective, self.transport.groups[0], self.operand, self.result, self.root, op)
                return
            tally = _tally(self.transport, self.collective)
            if tally is None:
                drive(carry_out(self.transport, program, self.operand, self.result, op=op, rounding=rounding))
            else:
                counted = Counting(self.transport, tally)
                counted.run(carry_out(counted, program, self.operand, self.result, op=op, rounding=rounding))

    def _agree(self, transport: TorchGroup, algorithm: str, op: str, rounding: str, segments: int | None) -> None:
        tensor = self.operand if self.operand is not None else self.result
        if transport.size == 1 or tensor is None:
            return
        if self.collective == "send_recv":
            if transport.rank == self.root:
                announce(transport, self.target, tensor)
            else:
                expect(transport, self.root, tensor)
            return
        words = [self.collective, str(tensor.dtype)[6:], f"{self.nbytes} bytes"]
        words += [f"root {self.root}"] if self.collective in ROOTED else []
        words += [op, f"rounded {rounding}"] if self.collective in REDUCING else []
        words += [f"{segments} segments"] if segments else []
        agree(transport, ", ".join([*words, algorithm]))

    @property
    def known(self) -> list[str]:
        return ["auto", *algorithms(self.collective), *CHOSEN]

    def named(self, algorithm: str, segments: int | None, topology: "Links") -> Program:
        hosts: tuple[str, ...] | None = None
        if ALGORITHMS[algorithm].uses_hosts:
            known = getattr(topology, "topology", topology)
            hosts = hosts_of(self.transport) if known is None else known.hosts
        return build(
            self.collective,
            algorithm,
            self.transport.size,
            hosts=hosts,
            segments=segments or 1,
            root=self.root,
            target=self.target,
        )

    def chosen(self, algorithm: str, segments: int | None, topology: "Links", op: str, rounding: str) -> Program | None:
        """What the cost model picks, or makes of the links; None: the backend's own collective."""
        if algorithm not in self.known:
            raise unknown_name("algorithm", algorithm, self.known, self.collective)
        tensor = self.operand if self.operand is not None else self.result
        assert tensor is not None
        half = rounding == "once" and tensor.dtype in HALVES
        found = probed(self.transport) if topology is None else topology
        # A backend's own sums of half precision are rounded at every hop, and not every backend has averages.
        own = isinstance(self.transport, TorchGroup) and not (self.collective in REDUCING and (half or op == "avg"))
        return _choice(
            self.collective,
            self.nbytes,
            _Same(found),
            algorithm,
            segments,
            self.root,
            self.target,
            tensor.element_size(),
            half,
            own,
        ).program


class _Same:
    """A key that stands for one very object: topologies are large, and hold mappings."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@lru_cache(maxsize=1024)
def _choice(
    collective: str,
    nbytes: int,
    found: "_Same",
    algorithm: str,
    segments: int | None,
    root: int,
    target: int,
    itemsize: int,
    half: bool,
    own: bool,
) -> "Choice":
    from shoal.comm.collectives.choose import choose

    known = found.value
    links = getattr(known, "topology", known)
    return choose(
        collective,
        nbytes,
        links,
        root=root,
        target=target,
        itemsize=itemsize,
        half=half,
        only=None if algorithm == "auto" else (algorithm,),
        segments=segments,
        curves=getattr(known, "curves", ()) if own else (),
        corrections=getattr(known, "corrections", None),
    )


def _tally(transport: Transport, collective: str) -> Tally | None:
    """Where a call over a torch group is counted; None: nowhere, or by the backend itself."""
    if not isinstance(transport, TorchGroup) or transport.counts_itself:
        return None
    group = transport.groups[0]
    if group not in _counters:
        _counters[group] = Counters(transport.members[transport.rank], [f"rank {rank}" for rank in transport.members])
    return _counters[group].tally(collective, transport.backend)


def probed(transport: Transport) -> Any:
    """The group's links, measured when first asked for; all ranks call it."""
    if not isinstance(transport, TorchGroup):
        raise UserError("algorithm 'auto' needs a topology over this transport: give one, or name an algorithm.")
    group = transport.groups[0]
    if group not in _probed:
        import shoal.comm

        _probed[group] = shoal.comm.probe(list(transport.groups) if transport.lanes > 1 else group)
    return _probed[group]


def device_of(transport: Transport) -> torch.device:
    return transport.device if isinstance(transport, TorchGroup) else torch.device("cpu")


def hosts_of(transport: Transport) -> tuple[str, ...]:
    """A name of every rank's host, alike where ranks share one; asked once for each group. All ranks call it."""
    key = getattr(transport, "groups", (transport,))[0]
    if key not in _hosts_of:
        mine = torch.frombuffer(bytearray(_host_id()), dtype=torch.uint8).to(device_of(transport))
        rows = mine.new_empty(transport.size * len(mine))
        drive(carry_out(transport, build("all_gather", "direct", transport.size), mine, rows))
        _hosts_of[key] = tuple(bytes(row.tolist()).hex() for row in rows.chunk(transport.size))
    return _hosts_of[key]


def _host_id() -> bytes:
    """16 bytes: of the running kernel and the network it is in, so that emulated hosts are hosts too."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        network = str(Path("/proc/self/ns/net").readlink())
    except OSError:
        boot, network = socket.gethostname(), ""
    return hashlib.sha256(f"{boot}{network}".encode()).digest()[:16]
