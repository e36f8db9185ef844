"""The workers' end: one object that talks to all servers of a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoal.comm.finishing import block_squares
from shoal.comm.heap import Heap
from shoal.comm.layout import BLOCK
from shoal.comm.server import optimizer as optimizers
from shoal.comm.server import rows
from shoal.comm.server.cuts import Part
from shoal.comm.server.service import chunk_of, state_message
from shoal.comm.server.setup import Setup
from shoal.comm.server.store import Memory, bytes_of, chunks, fragment_runs, weight_runs
from shoal.comm.server.wire import Form, Kind, Message
from shoal.errors import RunFailed


class Link(Protocol):
    """The way to one server. Messages arrive in order; a server that has gone raises when it is noticed."""

    name: str
    sent_bytes: int
    received_bytes: int

    def send(self, message: Message) -> None: ...
    def receive(self) -> Message: ...
    def close(self) -> None: ...


class Grant:
    """What the servers answered to a commit or a pull, all of them together."""

    def __init__(self) -> None:
        self.ahead = 0  # steps ahead of the slowest, on the server where it is most
        self.version = 0  # updates that every server has made at least
        self.last = -1  # the step after which all stop; -1 while nobody asked
        self.rows: list[tuple[int, int, bytes]] = []  # (worker, clock, row of facts) that were left for the lead


class Client:
    """``heap``: the memory that worker and servers share; None when they share none, and numbers travel.

    ``sparse``: slots of which only rows that are not zero travel."""

    def __init__(
        self,
        links: Sequence[Link],
        worker: int,
        setup: Setup,
        parameters: Sequence[nn.Parameter],
        heap: Heap | None,
        *,
        sparse: Iterable[int] = (),
        squeeze: Callable[[object, Tensor], tuple[Mapping[str, Any], Tensor]] | None = None,
    ) -> None:
        self.links, self.worker, self.setup = links, worker, setup
        self._parameters = list(parameters)
        self._squeeze = squeeze
        self.memory = Memory(setup, heap, replicas=not setup.synchronous) if heap else None
        self.parts = [setup.parts(server) for server in range(setup.servers)]
        self._runs = [weight_runs(setup, held) for held in self.parts]
        self._by_bucket = [
            {b: [p for p in held if p.bucket == b] for b in {p.bucket for p in held}} for held in setup.pieces
        ]
        self._sparse = {
            bucket for slot in sparse for bucket in setup.layout.buckets_of(slot)
        }  # buckets that hold an embedding
        state = setup.layout.state_start
        self._cut = sorted({a // BLOCK for held in setup.pieces for a, _ in fragment_runs(setup, held) if a < state})
        self._copied: list[int] = []  # slots whose parameter cannot be a view of the memory
        self._staged = {
            slot: torch.empty(parameter.numel(), dtype=parameter.dtype)
            for slot, parameter in enumerate(self._parameters)
            if self.memory is None and not parameter.is_contiguous()
        }
        self._waiting = False
        self._received = 0

    # --- before the first step --------------------------------------------------------------------------------

    def begin(self, optimizer: torch.optim.Optimizer, *, lead: bool) -> int:
        """Give the servers what they serve (the lead does), and join; the clock that this worker starts at."""
        if lead:
            self._set_up(optimizer)
        if self.memory is not None:
            self._bind()
        for link in self.links:
            words = {"fingerprint": self.setup.fingerprint}
            link.send(Message(Kind.join, self.worker, words=words))
        return max(self._expect(link, Kind.welcome).clock for link in self.links)

    @torch.no_grad()
    def _set_up(self, optimizer: torch.optim.Optimizer) -> None:
        for link in self.links:
            link.send(Message(Kind.setup, self.worker, words=self.setup.to_words()))
        for link in self.links:
            self._expect(link, Kind.done)
        if self.memory is not None:
            for slot, parameter in enumerate(self._parameters):
                self.memory.parameter(slot, self.memory.weights).copy_(parameter)
        else:
            self._put_weights()
        self._put_state(optimizer)

    def _put_weights(self) -> None:
        for link, held, runs in zip(self.links, self.parts, self._runs, strict=True):
            for number, (first, stop) in enumerate(runs):
                data = torch.cat([self._flat(part).view(torch.uint8) for part in held[first:stop]])
                words = {"what": "weights", "run": number}
                link.send(Message(Kind.put, self.worker, words=words, dtype="uint8", data=data.numpy()))

    def _flat(self, part: Part) -> Tensor:
        return self._parameters[part.slot].detach().reshape(-1)[part.start : part.stop]

    def _put_state(self, optimizer: torch.optim.Optimizer) -> None:
        for link, held in zip(self.links, self.parts, strict=True):
            link.send(Message(Kind.put, self.worker, words={"what": "forget"}))
            for part in held:
                for key, value in optimizer.state.get(self._parameters[part.slot], {}).items():
                    if not isinstance(value, Tensor):
                        words = {"what": "state", "slot": part.slot, "start": part.start, "key": key}
                        words["value"] = optimizers.plain(value)
                        link.send(Message(Kind.put, self.worker, words=words))
                        continue
                    for chunk in chunks(part.slot, part.start, key, self._own(part, value)):
                        link.send(self._from(state_message(chunk, Kind.put)))
            link.send(Message(Kind.put, self.worker, words={"what": "end"}))
        for link in self.links:
            self._expect(link, Kind.done)

    def _from(self, message: Message) -> Message:
        return Message(Kind(message.kind), self.worker, words=message.words, dtype=message.dtype, data=message.data)

    def _own(self, part: Part, value: Tensor) -> Tensor:
        """The part's run of a state that has an element for each of the parameter's; all of any other state."""
        size = self.setup.gradients[part.slot]
        whole = part.start == 0 and part.stop == size
        return value if whole or value.dim() == 0 else value.reshape(-1)[part.start : part.stop]

    def _bind(self) -> None:
        """The parameters become views of the shared memory, so that nothing has to be copied."""
        assert self.memory is not None
        synchronous = self.setup.synchronous
        home = self.memory.weights if synchronous else self.memory.replicas[self.worker]
        for slot, parameter in enumerate(self._parameters):
            view = self.memory.parameter(slot, home)
            if not synchronous:
                view.copy_(parameter.detach())
            if parameter.stride() == view.stride():
                parameter.data = view
            else:  # its kernels may sum in another order on a tensor that lies in rows
                self._copied.append(slot)
        self._home = home

    # --- a step -----------------------------------------------------------------------------------------------

    def operands(self) -> list[Tensor]:
        """Where this worker's gradient is to be written: flat buffers that the servers read."""
        if self.memory is not None:
            return self.memory.operands[self.worker]
        count = self.setup.partials[self.worker] if self.worker < len(self.setup.partials) else 1
        return [torch.zeros(self.setup.layout.elements, dtype=self.setup.flat_dtype) for _ in range(count)]

    def push(
        self, clock: int, bucket: int, operands: Sequence[Tensor], counts: Sequence[float], passes: Sequence[int]
    ) -> int:
        """A bucket of this step's gradient is final; the bytes that left, or that the servers read in shared memory.

        ``counts`` and ``passes``: of each leaf."""
        before = sum(link.sent_bytes for link in self.links)
        read = 0
        for link, held in zip(self.links, self._by_bucket, strict=True):
            pieces = held.get(bucket)
            if pieces is None:
                continue
            words = {"counts": list(counts), "passes": list(passes)}
            message = Message(Kind.push, self.worker, clock, bucket, words=words)
            if self.memory is None and operands:
                runs = [operand[piece.start : piece.stop] for operand in operands for piece in pieces]
                message = self._packed(message, runs, link.name)
            elif operands:
                read += sum(piece.stop - piece.start for piece in pieces) * sum(each.itemsize for each in operands)
            link.send(message)
        return sum(link.sent_bytes for link in self.links) - before + read

    def travels_by_rows(self, slot: int) -> None:
        """From now on, of this parameter's gradient only rows that are not zero travel."""
        self._sparse.update(self.setup.layout.buckets_of(slot))

    def take_received(self) -> int:
        """Bytes that have come since the last call."""
        before, self._received = self._received, sum(link.received_bytes for link in self.links)
        return self._received - before

    def _packed(self, plain: Message, runs: Sequence[Tensor], server: str) -> Message:
        flat = runs[0] if len(runs) == 1 else torch.cat(list(runs))
        dtype, words, form = self.setup.dtype, dict(plain.words), Form.dense
        data: Any = flat.numpy()
        if plain.bucket in self._sparse:
            packed = rows.packed(flat)
            if packed is not None:
                dtype, form, data = "uint8", Form.rows, packed.numpy()
        if form is Form.dense and self._squeeze is not None:
            extra, payload = self._squeeze((plain.bucket, server, len(runs)), flat)
            words |= extra
            dtype, form, data = "uint8", Form.compressed, payload.numpy()
        return Message(plain.kind, plain.worker, plain.clock, plain.bucket, form, dtype, words, data)

    @torch.no_grad()
    def sums(self, clock: int, into: Tensor) -> Tensor:
        """Wait for the sum of a synchronous round: the squares of the norm's blocks, float64 [blocks].

        ``into`` [elements]: gets the mean change of the buffers, where the servers' memory is not our own."""
        if self.memory is not None:
            for link in self.links:
                self._expect(link, Kind.summed, clock)
            squares = self.memory.squares.clone()
            for block in self._cut:
                squares[block] = block_squares(into[block * BLOCK : (block + 1) * BLOCK])[0]
            return squares
        squares = torch.zeros(self.setup.layout.elements // BLOCK, dtype=torch.float64)
        cut = {block: torch.zeros(BLOCK, dtype=into.dtype) for block in self._cut}
        width = into.dtype.itemsize
        for link, held in zip(self.links, self.setup.pieces, strict=True):
            message = self._expect(link, Kind.summed, clock)
            squares[message.words["blocks"]] = torch.tensor(message.words["squares"], dtype=torch.float64)
            data, start = torch.frombuffer(bytearray(message.data), dtype=torch.uint8), 0
            for a, b in fragment_runs(self.setup, held):
                run = data[start : start + (b - a) * width].view(into.dtype)
                start += (b - a) * width
                if a >= self.setup.layout.state_start:
                    into[a:b] = run
                else:
                    cut[a // BLOCK][a % BLOCK : a % BLOCK + b - a] = run
        for block, values in cut.items():
            squares[block] = block_squares(values)[0]
        return squares

    def commit(
        self,
        clock: int,
        groups: Sequence[Mapping[str, Any]],
        *,
        factor: float = 1.0,
        share: float = 1.0,
        unused: Sequence[int] = (),
        stop: bool = False,
        row: bytes = b"",
    ) -> None:
        """Have the push applied; the weights come with `arrive`."""
        words = {"groups": list(groups), "factor": factor, "share": share, "unused": list(unused), "stop": stop}
        for server, link in enumerate(self.links):
            link.send(Message(Kind.commit, self.worker, clock, words=words, data=row if server == 0 else b""))
        self._waiting = True

    def retract(self, clock: int) -> None:
        """Take back the push of a synchronous round whose sum is known, on all servers; called by all workers."""
        for link in self.links:
            link.send(Message(Kind.retract, self.worker, clock))

    def pull(self, version: int = 0) -> None:
        """Ask for the weights once every server has made so many updates; they come with `arrive`."""
        for link in self.links:
            link.send(Message(Kind.pull, self.worker, words={"version": version}))
        self._waiting = True

    @torch.no_grad()
    def arrive(self) -> Grant | None:
        """Wait for the weights that were asked for; None when none were."""
        if not self._waiting:
            return None
        self._waiting = False
        grant = Grant()
        versions = []
        for server, link in enumerate(self.links):
            while (message := self._expect(link, Kind.grant, Kind.weights, Kind.summed)).kind is not Kind.grant:
                if message.kind is Kind.weights:  # a sum that nobody asked the norm of is passed over
                    self._take_weights(server, message)
            grant.ahead = max(grant.ahead, message.words["ahead"])
            versions.append(message.words["version"])
            if server == 0:
                grant.last = message.words["last"]
                start = 0
                for worker, clock, size in message.words.get("rows", ()):
                    grant.rows.append((worker, clock, bytes(message.data[start : start + size])))
                    start += size
        grant.version = min(versions)
        for slot in self._copied:
            assert self.memory is not None
            self._parameters[slot].copy_(self.memory.parameter(slot, self._home))
        for slot, staged in self._staged.items():
            self._parameters[slot].copy_(staged.view(self._parameters[slot].shape))
        return grant

    def _take_weights(self, server: int, message: Message) -> None:
        first, stop = self._runs[server][message.bucket]
        data = torch.frombuffer(message.data, dtype=torch.uint8)
        start = 0
        for part in self.parts[server][first:stop]:
            flat = self._staged.get(part.slot)
            if flat is None:
                flat = self._parameters[part.slot].data.view(-1)
            end = start + bytes_of(self.setup, part)
            flat[part.start : part.stop].view(torch.uint8).copy_(data[start:end])
            start = end

    # --- the optimiser's state --------------------------------------------------------------------------------

    @torch.no_grad()
    def fetch_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the local optimiser hold what the servers' hold."""
        optimizer.state.clear()
        open_: dict[tuple[int, int, str], Tensor] = {}
        for server, link in enumerate(self.links):
            link.send(Message(Kind.get, self.worker))
            stops = {(part.slot, part.start): part.stop for part in self.parts[server]}
            while (message := self._expect(link, Kind.state, Kind.done)).kind is Kind.state:
                chunk = chunk_of(message)
                state = optimizer.state[self._parameters[chunk.slot]]
                if chunk.value is not None:
                    state[chunk.key] = optimizers.restored(chunk.value)
                    continue
                size = self.setup.gradients[chunk.slot]
                stop = stops[chunk.slot, chunk.start]
                cut = stop - chunk.start < size and len(chunk.shape) == 1
                place = (chunk.slot, chunk.start, chunk.key)
                if place not in open_:
                    dtype = getattr(torch, chunk.dtype)
                    if chunk.key not in state:
                        shape = self.setup.shapes[chunk.slot] if cut else chunk.shape
                        state[chunk.key] = torch.zeros(shape, dtype=dtype)
                    flat = state[chunk.key].view(-1)
                    open_[place] = (flat[chunk.start : stop] if cut else flat).view(torch.uint8)
                if len(chunk.data):
                    open_[place][chunk.offset : chunk.offset + len(chunk.data)] = chunk.data

    def leave(self) -> None:
        for link in self.links:
            link.send(Message(Kind.leave, self.worker))
        for link in self.links:
            self._expect(link, Kind.done)

    def _expect(self, link: Link, *wanted: Any) -> Message:
        """The next message of a server, of one of the kinds; a number among ``wanted`` is the clock it must have."""
        message = link.receive()
        if message.kind is Kind.refused:
            raise RunFailed(f"{link.name} refused what worker {self.worker} sent: {message.words.get('why')}.")
        kinds = [kind for kind in wanted if isinstance(kind, Kind)]
        clocks = [clock for clock in wanted if not isinstance(clock, Kind)]
        if message.kind not in kinds or (clocks and message.clock != clocks[0]):
            raise RunFailed(
                f"{link.name} said {message.kind.name} {message.clock} where worker {self.worker} expected "
                f"{' or '.join(kind.name for kind in kinds)}{f' {clocks[0]}' if clocks else ''}."
            )
        return message
