"""How a run's workers reach its servers, and what they tell them."""

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from shoal.comm.group import Group, HostGroup
from shoal.comm.heap import Heap
from shoal.comm.layout import Layout
from shoal.comm.server import optimizer as optimizers
from shoal.comm.server import shared
from shoal.comm.server.client import Client, Link
from shoal.comm.server.exchanges import ServedExchange, StaleExchange
from shoal.comm.server.setup import Setup
from shoal.comm.wired import WiredGroup
from shoal.errors import UserError

if TYPE_CHECKING:
    import torch

    from shoal.comm.server.tcp import ServerThread


@dataclass
class Roster:
    """The servers of a run, as one worker sees them."""

    links: Sequence[Link]
    heap: Heap | None  # shared with them; None: numbers travel
    housed: list["ServerThread"] = field(default_factory=list)  # those that live in this worker's process

    def close(self) -> None:
        for link in self.links:
            link.close()
        for server in self.housed:
            server.close()


def reach(group: Group, servers: int) -> Roster:
    """On one host: the server processes beside the workers, through shared memory; of elastic ones on several hosts,
    over the sockets that the agents gave them. Under torchrun and the like: server s is a thread of worker s mod
    workers, over TCP. Called by every worker."""
    if isinstance(group, HostGroup):
        if group.servers is None:
            raise UserError(f"{servers} parameter servers are wanted, and the run was started without any.")
        return Roster(shared.links(group.servers), group.server_heap)
    if isinstance(group, WiredGroup):
        assert group.servers is not None, "agents of several hosts make a server of one process at least"
        return Roster(shared.links(group.servers), None)
    from shoal.comm.server.tcp import ServerThread, TcpLink, new_token

    hosts = [json.loads(said) for said in group.gather(json.dumps([group.host, _own_address()]).encode())]
    one_host = len({host for host, _ in hosts}) == 1
    address = "127.0.0.1" if one_host else hosts[group.rank][1]
    token = group.gather(new_token() if group.rank == 0 else b"")[0]
    mine = [server for server in range(servers) if server % group.world == group.rank]
    housed = [ServerThread(server, token=token, host=address) for server in mine]
    said = json.dumps({server: thread.address for server, thread in zip(mine, housed, strict=True)}).encode()
    addresses = {int(k): v for row in group.gather(said) for k, v in json.loads(row).items()}
    links = [TcpLink(addresses[server], server, token=token, report=group.report) for server in range(servers)]
    for server, link in enumerate(links):
        link.name = f"server {server} of rank {server % group.world} at {link.name.rpartition(' ')[2]}"
    return Roster(links, None, housed)


def _own_address() -> str:
    """The address of the interface that leads to the run's first host; nothing is sent."""
    import os

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def setup_of(
    exchange: StaleExchange | ServedExchange,
    parameters: Sequence[nn.Parameter],
    state: Sequence[Tensor],
    optimizer: "torch.optim.Optimizer",
    *,
    servers: int,
    bound: int | None,
    bucket_elements: int,
) -> Setup:
    """What the servers are told of a run. Raises UserError when the optimiser or the number of servers cannot be."""
    name = optimizers.check(optimizer)
    slots = {id(parameter): slot for slot, parameter in enumerate(parameters)}
    synchronous = isinstance(exchange, ServedExchange)
    terms, placement = exchange.terms, exchange.placement
    layout = terms.layout
    members = [[slots[id(p)] for p in group["params"] if id(p) in slots] for group in optimizer.param_groups]
    setup = Setup(
        scheme="synchronous" if synchronous else "stale",
        bound=bound,
        expected=exchange.group.world,
        servers=servers,
        gradients=tuple(p.numel() for p in parameters),
        shapes=tuple(tuple(p.shape) for p in parameters),
        dtypes=tuple(_name(p.dtype) for p in parameters),
        state=tuple(b.numel() for b in state),
        workers=layout.buckets[0].workers,
        bucket_elements=bucket_elements,
        dtype=_name(terms.dtype),
        leaves=len(terms.most_passes),
        ownership=tuple((own.start, own.stop) for own in placement.ownership) if synchronous else (),
        partials=tuple(terms.partials() if synchronous else [1] * exchange.group.world),
        facts=terms.facts,
        whole=optimizers.needs_whole(name, [p.dtype for p in parameters]),
        optimizer=name,
        defaults={k: optimizers.plain(v) for k, v in optimizer.defaults.items()},
        groups=tuple(optimizers.options_of(optimizer)),
        members=tuple(map(tuple, members)),
    )
    _check(setup, layout)
    return setup


def _check(setup: Setup, layout: Layout) -> None:
    from shoal.comm.server import wire

    assert setup.layout == layout
    setup.pieces  # noqa: B018  (raises when there are too many servers)
    longest = max(b.slice * b.workers for b in layout.buckets) * setup.flat_dtype.itemsize * max(setup.partials)
    if longest > wire.DATA_LIMIT:
        raise UserError(
            f"plan: a bucket of {longest} bytes is too much for one message to a parameter server: "
            f"lower bucket_bytes to {wire.DATA_LIMIT // max(setup.partials)} or less."
        )


def connect(
    exchange: StaleExchange | ServedExchange,
    roster: Roster,
    setup: Setup,
    parameters: Sequence[nn.Parameter],
    optimizer: "torch.optim.Optimizer",
    *,
    sparse: Sequence[int] = (),
    compression: str = "none",
) -> Client:
    """Hand weights and the optimiser's state to the servers, and be welcomed. Called by every worker."""
    rank = exchange.group.rank
    squeeze = None
    if compression != "none":
        from shoal.comm.server.squeeze import Squeezer

        if roster.heap is not None:
            raise UserError(
                f"plan: compression = {compression!r} gains nothing where workers and servers share memory: "
                f"leave it out."
            )
        squeeze = Squeezer(compression)
    client = Client(roster.links, rank, setup, parameters, roster.heap, sparse=sparse, squeeze=squeeze)
    client.begin(optimizer, lead=rank == 0)
    exchange.connect(client)
    return client


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
