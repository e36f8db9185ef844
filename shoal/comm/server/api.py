"""A parameter server for a loop of one's own: push gradients, pull weights, join and leave at any time.

docs/parameter_server.md shows both ends.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn

from shoal.comm import past_cache
from shoal.comm.layout import flat_layout
from shoal.comm.server import optimizer as optimizers
from shoal.comm.server.client import Client
from shoal.comm.server.roster import Roster
from shoal.comm.server.setup import Setup
from shoal.comm.server.squeeze import Squeezer
from shoal.comm.server.tcp import LOOPBACK, ServerThread, TcpLink, new_token
from shoal.errors import UserError

if TYPE_CHECKING:
    from shoal.comm.group import Group

Mode = Literal["sync", "ssp", "async"]


@dataclass(frozen=True)
class Served:
    """Where servers are, and what opens them."""

    addresses: tuple[str, ...]  # "host:port"
    token: bytes


@contextmanager
def serve(servers: int = 1, *, host: str = LOOPBACK, token: bytes | None = None) -> Iterator[Served]:
    """Servers in threads of this process, for as long as the block lasts; ``python -m shoal.comm.server`` starts one
    in a process of its own. ``host``: the interface to listen on."""
    secret = token or new_token()
    threads = [ServerThread(server, token=secret, host=host) for server in range(servers)]
    try:
        yield Served(tuple(thread.address for thread in threads), secret)
    finally:
        for thread in threads:
            thread.close()


class ParameterServer:
    """One worker's hand on parameters that lie on servers; the optimiser runs there.

    The optimiser that is given says which one and with what options: its groups are read at every push, so that a
    scheduler works on it as ever. Worker 0 gives the servers its weights when they have none yet.

    - mode "sync": a round takes one push of every worker; the mean is weighted by ``count``.
    - mode "ssp": a push is applied when it comes; `pull` waits while this one is more than ``staleness`` steps ahead.
    - mode "async": as "ssp", without a bound.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        servers: "Served | Group",
        *,
        worker: int,
        mode: Mode = "sync",
        staleness: int = 0,
        expected: int = 0,
        compression: str = "none",
        bucket_bytes: int = 4 << 20,
    ) -> None:
        """``servers``: as `serve` gave them, or the group of a run with servers on this host.

        ``expected``: workers 0 .. expected - 1 are waited for from the start. Raises UserError for what cannot be
        served, RunFailed when the servers hold another model, PeerLost when they are not there."""
        self._given = [p for p in parameters if p.requires_grad]
        self.optimizer, self.worker, self.mode = optimizer, worker, mode
        if not self._given:
            raise UserError("a parameter server needs a parameter that requires a gradient.")
        if any(p.device.type != "cpu" for p in self._given):
            raise UserError("a parameter server takes parameters on the processor: move the module there first.")
        optimizers.check(optimizer)
        self._parameters = self._given[::-1]  # the order in which a backward pass makes their gradients
        self._roster = _roster(servers)
        if not isinstance(servers, Served):
            expected = servers.world  # the memory of their gradients is there from the start
        try:
            self._join(mode, staleness, expected, compression, bucket_bytes)
        except BaseException:
            self.close()
            raise

    def _join(self, mode: Mode, staleness: int, expected: int, compression: str, bucket_bytes: int) -> None:
        self.setup = self._setup(mode, staleness, expected, len(self._roster.links), bucket_bytes)
        squeeze = Squeezer(compression) if compression != "none" else None
        self._client = Client(
            self._roster.links, self.worker, self.setup, self._parameters, self._roster.heap, squeeze=squeeze
        )
        self._clock = self._client.begin(self.optimizer, lead=self.worker == 0)
        self._flat = self._client.operands()[0]
        self._views = [
            self._flat[slot.offset : slot.offset + slot.size].view(parameter.shape)
            for parameter, slot in zip(self._parameters, self.setup.layout.slots, strict=True)
        ]
        self.version = self.ahead = 0
        self._client.pull()
        self.pull()

    def _setup(self, mode: Mode, staleness: int, expected: int, servers: int, bucket_bytes: int) -> Setup:
        parameters, optimizer = self._parameters, self.optimizer
        if mode not in ("sync", "ssp", "async") or staleness < 0 or (staleness and mode != "ssp"):
            raise UserError(f"mode {mode!r} with staleness {staleness}: use sync, ssp with staleness = s, or async.")
        name = optimizers.check(optimizer)
        slots = {id(parameter): slot for slot, parameter in enumerate(parameters)}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        elements = bucket_bytes // dtype.itemsize
        layout = flat_layout([p.numel() for p in parameters], [], 1, elements)
        return Setup(
            scheme="synchronous" if mode == "sync" else "stale",
            bound=None if mode == "async" else staleness,
            expected=expected,
            servers=servers,
            gradients=tuple(p.numel() for p in parameters),
            shapes=tuple(tuple(p.shape) for p in parameters),
            dtypes=tuple(str(p.dtype).removeprefix("torch.") for p in parameters),
            state=(),
            workers=layout.buckets[0].workers,
            bucket_elements=elements,
            dtype=str(dtype).removeprefix("torch."),
            leaves=1,
            ownership=(),
            partials=(1,) * expected,
            facts=0,
            whole=optimizers.needs_whole(name, [p.dtype for p in parameters]),
            optimizer=name,
            defaults={k: optimizers.plain(v) for k, v in optimizer.defaults.items()},
            groups=tuple(optimizers.options_of(optimizer)),
            members=tuple(
                tuple(slots[id(p)] for p in group["params"] if id(p) in slots) for group in optimizer.param_groups
            ),
        )

    @torch.no_grad()
    def push(
        self,
        gradients: Sequence[Tensor | None] | None = None,
        *,
        count: float = 1.0,
        share: float = 1.0,
    ) -> None:
        """Hand over the mean gradient of ``count`` samples; returns before it has arrived.

        ``gradients``: one a parameter, as given; None for one that has none; left out: those of ``.grad``. A sparse
        one travels by the rows that it has. ``share``: of the learning rate, in modes that apply each push by itself.
        The gradients may be changed when this returns, but for those of `hold_gradients`."""
        self._client.arrive()
        given = [p.grad for p in self._given] if gradients is None else list(gradients)
        if len(given) != len(self._given):
            raise UserError(f"{len(given)} gradients for {len(self._given)} parameters.")
        weight = count if self.setup.synchronous else 1.0
        copy = past_cache.copier(self._flat.nbytes)
        unused = []
        for slot, (gradient, view) in enumerate(zip(given[::-1], self._views, strict=True)):
            if gradient is None:
                unused.append(slot)
                view.zero_()
            elif gradient.is_sparse:
                self._client.travels_by_rows(slot)
                rows = gradient.coalesce()
                view.zero_()
                view[rows.indices()[0]] = rows.values().to(view.dtype)
            elif gradient.data_ptr() != view.data_ptr():
                copy(view, gradient)
            if weight != 1.0 and gradient is not None:
                view.mul_(weight)
        for bucket in range(len(self.setup.layout.buckets)):
            self._client.push(self._clock, bucket, [self._flat], [float(count)], [1])
        self._client.commit(self._clock, optimizers.options_of(self.optimizer), share=share, unused=unused)
        self._clock += 1

    def hold_gradients(self) -> list[Tensor]:
        """Zeros, one a parameter, that need not be copied to be pushed: they lie where the servers of this host read
        them. Set them as ``.grad``, and clear them with ``zero_grad(set_to_none=False)`` after `pull`, not before."""
        for view in self._views:
            view.zero_()
        return self._views[::-1]

    def pull(self, min_version: int = 0) -> int:
        """Wait for weights that every server has updated ``min_version`` times at least, this worker's last push among
        them; the parameters then hold them. The number of updates of the shard that has fewest."""
        grant = self._client.arrive()
        if grant is None or grant.version < min_version:
            self._client.pull(min_version)
            grant = self._client.arrive()
        assert grant is not None
        self.version, self.ahead = grant.version, grant.ahead
        return self.version

    def fetch_state(self) -> None:
        """Make the local optimiser hold the servers' state, for a checkpoint."""
        self._client.arrive()
        self._client.fetch_state(self.optimizer)

    def leave(self) -> None:
        """Go; nobody waits for this worker any more. The servers and the others go on."""
        self._client.arrive()
        self._client.leave()
        self.close()

    def close(self) -> None:
        """Let go of the connections; the servers notice."""
        self._roster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.leave()
        else:
            self.close()


def _roster(servers: "Served | Group") -> Roster:
    from shoal.comm.group import HostGroup
    from shoal.comm.server.roster import reach

    if isinstance(servers, Served):
        links = [TcpLink(address, i, token=servers.token) for i, address in enumerate(servers.addresses)]
        return Roster(links, None)
    if not isinstance(servers, HostGroup) or servers.servers is None:
        raise UserError("ParameterServer takes what `serve` gave, or the group of a run with servers on this host.")
    return reach(servers, servers.servers.world)
