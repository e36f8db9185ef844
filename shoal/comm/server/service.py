"""One server: messages of workers in, messages to workers out. No socket and no process; transports call it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.comm.heap import Heap
from shoal.comm.server import rows, shard, wire
from shoal.comm.server.setup import Setup
from shoal.comm.server.shard import Shard
from shoal.comm.server.store import CHUNK_BYTES, Chunk, Memory, Store, denominators, round_adds, weight_runs
from shoal.comm.server.wire import Form, Kind, Message, WireError
from shoal.errors import ShoalError

Out = list[tuple[int, Message]]  # (worker, message)


@dataclass
class _Arrived:
    """What has come of one worker's step."""

    clock: int = -1
    buckets: set[int] = field(default_factory=set)
    counts: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    commit: Mapping[str, Any] = field(default_factory=dict)


class Service:
    """``shared``: workers write gradients and read weights in this process's memory, and messages carry no numbers.

    ``refused`` counts the messages that were not understood or not allowed, by reason: they change nothing."""

    def __init__(self, server: int, heap: Heap, *, shared: bool, limit_bytes: int = 1 << 40) -> None:
        self.server = server
        self.shared = shared
        self.refused: Counter[str] = Counter()
        self.setup: Setup | None = None
        self._heap, self._limit = heap, limit_bytes
        self._lead = -1  # who sent the setup
        self._ready = False
        self._early: list[tuple[int, Message]] = []  # joins that came before the setup was complete
        self._arrived: dict[int, _Arrived] = {}
        self._facts: list[tuple[int, int, bytes]] = []  # (worker, clock, row) that the lead has not seen
        self._summed: dict[int, int] = {}  # bucket -> of which round
        self.updates = 0  # that have been made

    def handle(self, worker: int, message: Message) -> Out:
        """Never raises for what a message says: it is refused, counted, and its sender told."""
        try:
            return self._handle(worker, message)
        except ShoalError as error:  # WireError, UserError, BadPayload
            return [self._refusal(worker, str(error))]
        except Exception as error:  # whatever a message can bring about is its sender's trouble, not the others'
            return [self._refusal(worker, f"{type(error).__name__}: {error}")]

    @property
    def ready(self) -> bool:
        """It has all weights and states: workers are let in."""
        return self._ready

    def leave(self, worker: int) -> Out:
        """A worker has gone, with or without a word."""
        self._arrived.pop(worker, None)
        self._early = [(who, message) for who, message in self._early if who != worker]
        return self._carry_out(self.machine.on(shard.Leave(worker))) if self._ready else []

    def _refusal(self, worker: int, why: str) -> tuple[int, Message]:
        self.refused[why.split(":")[0][:60]] += 1
        return worker, Message(Kind.refused, words={"why": why[:400]})

    def _handle(self, worker: int, message: Message) -> Out:
        kind = message.kind
        if kind is Kind.setup:
            return self._set_up(worker, message)
        if kind is Kind.join and not self._ready:
            self._early.append((worker, message))
            return []
        if kind is Kind.put and worker == self._lead:
            return self._put(worker, message)
        if not self._ready:
            raise WireError("the server has not been set up")
        if kind is Kind.join:
            return self._join(worker, message)
        if worker not in self.machine.clocks:
            raise WireError("has not joined")
        if kind is Kind.push:
            return self._push(worker, message)
        if kind is Kind.commit:
            return self._commit(worker, message)
        if kind is Kind.retract:
            return self._retract(worker, message)
        if kind is Kind.pull:
            return self._carry_out(self.machine.on(shard.Pull(worker, wire.whole(message.words, "version"))))
        if kind is Kind.get:
            return self._get(worker)
        if kind is Kind.leave:
            return [*self.leave(worker), (worker, Message(Kind.done))]
        raise WireError(f"a worker says {kind.name}")

    # --- before the first step --------------------------------------------------------------------------------

    def _set_up(self, worker: int, message: Message) -> Out:
        if self.setup is not None:
            raise WireError("the server has been set up already")
        setup = Setup.from_words(message.words)
        if self.server >= setup.servers:
            raise WireError(f"server {self.server} of {setup.servers}")
        elements = sum(setup.gradients) + sum(setup.state)
        if elements * setup.flat_dtype.itemsize > self._limit:
            raise WireError(f"a model of {elements} elements, where the limit is {self._limit} bytes")
        setup.pieces  # noqa: B018  (refused before anything is kept)
        memory = Memory(setup, self._heap, replicas=self.shared and not setup.synchronous)
        self.store = Store(setup, self.server, memory)
        self.runs = weight_runs(setup, self.store.parts)
        expected = range(setup.expected)
        self.machine = Shard(synchronous=setup.synchronous, bound=setup.bound, expected=expected)
        self.setup, self._lead = setup, worker
        return [(worker, Message(Kind.done))]

    def _put(self, worker: int, message: Message) -> Out:
        """A piece of the weights or of the optimiser's state; the last one makes the server ready."""
        assert self.setup is not None
        what = wire.text(message.words, "what")
        if what == "weights":
            first, stop = self.runs[wire.whole(message.words, "run", 0, len(self.runs) - 1)]
            data = _bytes(message)
            self._expect(len(data), self.store.weights_size(first, stop))
            self.store.unpack_weights(first, stop, data)
        elif what == "state":
            self.store.take_state(chunk_of(message))
        elif what == "forget":
            self.store.forget_state()
        elif what == "end":
            early, self._early, self._ready = self._early, [], True
            out = [(worker, Message(Kind.done))]
            for who, join in early:
                out.extend(self.handle(who, join))
            return out
        else:
            raise WireError(f"put {what!r}")
        return []

    @staticmethod
    def _expect(found: int, wanted: int) -> None:
        if found != wanted:
            raise WireError(f"{found} bytes where {wanted} are due")

    def _join(self, worker: int, message: Message) -> Out:
        assert self.setup is not None
        if wire.text(message.words, "fingerprint") != self.setup.fingerprint:
            raise WireError("another model, optimiser or scheme than the one that is served")
        if self.shared and worker >= self.setup.expected:
            raise WireError("no room in the shared memory for another worker")
        return self._carry_out(self.machine.on(shard.Join(worker)))

    # --- a step -----------------------------------------------------------------------------------------------

    def _push(self, worker: int, message: Message) -> Out:
        assert self.setup is not None
        if message.clock != self.machine.clocks[worker]:
            raise WireError(f"pushed step {message.clock} where step {self.machine.clocks[worker]} is due")
        arrived = self._arrived.setdefault(worker, _Arrived())
        if arrived.clock != message.clock:
            arrived = self._arrived[worker] = _Arrived(message.clock)
        if message.bucket not in self.store.by_bucket or message.bucket in arrived.buckets:
            raise WireError(f"bucket {message.bucket} is not due")
        if not arrived.buckets:
            counts, passes = self._counts(worker, message)
        else:
            counts, passes = arrived.counts, arrived.passes
        if not self.shared:
            self._take(worker, message, passes)
        arrived.counts, arrived.passes = counts, passes
        arrived.buckets.add(message.bucket)
        if self.setup.synchronous:
            self._sum_ready()
        if len(arrived.buckets) == len(self.store.by_bucket):
            return self._carry_out(self.machine.on(shard.Push(worker, message.clock)))
        return []

    def _counts(self, worker: int, message: Message) -> tuple[list[float], list[int]]:
        """The first push of a step says how many targets and passes each leaf has."""
        assert self.setup is not None
        leaves = self.setup.leaves if self.setup.ownership else 1
        passes = wire.wholes(message.words, "passes", length=leaves, most=1 << 30)
        counts = message.words.get("counts")
        if not isinstance(counts, list) or len(counts) != leaves:
            raise WireError("counts that are not one a leaf")
        return [wire.number({"count": count}, "count") for count in counts], passes

    def _take(self, worker: int, message: Message, passes: list[int]) -> None:
        """Copy the numbers of a push to where the worker's gradient lies."""
        assert self.setup is not None
        pieces = self.store.by_bucket[message.bucket]
        count = 1
        if self.setup.ownership and self.setup.synchronous:
            counts, _ = round_adds(self.setup, range(self.setup.expected), passes)
            count = counts[worker]
        operands = self.store.operands(worker)
        if count > len(operands):
            raise WireError(f"{count} partial sums of worker {worker}")
        into = [operand[piece.start : piece.stop] for operand in operands[:count] for piece in pieces]
        if message.form is not Form.dense and count:
            self._take_packed(message, into)
            return
        if count and message.dtype != self.setup.dtype:
            raise WireError(f"a gradient of {message.dtype} where {self.setup.dtype} is due")
        data = _bytes(message)
        self._expect(len(data), sum(run.nbytes for run in into))
        start = 0
        for run in into:
            run.view(torch.uint8).copy_(data[start : start + run.nbytes])
            start += run.nbytes

    def _take_packed(self, message: Message, into: list[Tensor]) -> None:
        if message.form is Form.rows:
            whole = torch.cat(into)
            rows.unpack(_bytes(message), whole)
        else:
            from shoal.comm.server.squeeze import unsqueezed  # the codecs come with it

            whole = unsqueezed(message, _bytes(message), sum(run.numel() for run in into)).to(into[0].dtype)
        for run, part in zip(into, torch.split(whole, [run.numel() for run in into]), strict=True):
            run.copy_(part)

    def _sum_ready(self) -> None:
        """Reduce, in order, the buckets that all workers of the round have pushed, while they go on."""
        assert self.setup is not None
        version = self.machine.version
        due = sorted(worker for worker, clock in self.machine.clocks.items() if clock == version)
        arrived = [self._arrived.get(worker) for worker in due]
        if not self.setup.ownership or any(a is None or a.clock != version for a in arrived):
            return  # whose members may change: summed when all is there
        if not self.machine.open:
            return  # some have pushed again, and the others not yet
        for bucket in self.store.by_bucket:
            if self._summed.get(bucket) != version and all(a is not None and bucket in a.buckets for a in arrived):
                self._sum(bucket, due)

    def _sum(self, bucket: int, members: list[int]) -> None:
        assert self.setup is not None
        passes = self._arrived[members[0]].passes
        if any(self._arrived[worker].passes != passes for worker in members) and self.setup.ownership:
            raise WireError("the workers are not at the same step")
        counts, adds = round_adds(self.setup, members, passes)
        operands = [o for w, n in zip(members, counts, strict=True) for o in self.store.operands(w)[:n]]
        by = denominators(self.setup, [self._arrived[worker].counts for worker in members], passes)
        self.store.sum(bucket, operands, adds, by)
        self._summed[bucket] = self.machine.version
        self._total = operands[0]

    def _retract(self, worker: int, message: Message) -> Out:
        done = self.machine.on(shard.Retract(worker, message.clock))
        if not any(isinstance(each, shard.Refuse) for each in done):
            self._arrived.pop(worker, None)
            self._summed.clear()
        return self._carry_out(done)

    def _commit(self, worker: int, message: Message) -> Out:
        words = message.words
        assert self.setup is not None
        groups = words.get("groups")
        if not isinstance(groups, list) or len(groups) != len(self.setup.groups):
            raise WireError("options that are not one a group")
        checked = {
            "groups": [options(group, like) for group, like in zip(groups, self.setup.groups, strict=True)],
            "factor": wire.number(words, "factor"),
            "share": wire.number(words, "share"),
            "unused": wire.wholes(words, "unused", most=len(self.setup.gradients) - 1),
        }
        arrived = self._arrived.get(worker)
        if arrived is not None and arrived.clock == message.clock:
            arrived.commit = checked
        done = self.machine.on(shard.Commit(worker, message.clock, words.get("stop") is True))
        if len(message.data) and worker != self._lead and not any(isinstance(i, shard.Refuse) for i in done):
            self._facts.append((worker, message.clock, bytes(message.data)))
        return self._carry_out(done)

    def _carry_out(self, instructions: Iterable[shard.Instruction]) -> Out:
        out: Out = []
        instructions = list(instructions)
        granted = {instruction.worker for instruction in instructions if isinstance(instruction, shard.Grant)}
        written: set[int] = set()  # whose replica has the newest weights
        for instruction in instructions:
            if isinstance(instruction, shard.Welcome):
                words = {"clock": instruction.clock, "version": self.machine.version}
                out.append((instruction.worker, Message(Kind.welcome, clock=instruction.clock, words=words)))
            elif isinstance(instruction, shard.Sum):
                out.extend(self._tell_sum(instruction))
            elif isinstance(instruction, shard.Apply):
                into = self._replica(instruction.worker) if instruction.worker in granted else None
                self._apply(instruction, into)
                written = {instruction.worker} if into is not None else set()
            elif isinstance(instruction, shard.Grant):
                out.extend(self._grant(instruction, written=instruction.worker in written))
            elif isinstance(instruction, shard.Refuse):
                out.append(self._refusal(instruction.worker, instruction.why))
        return out

    def _tell_sum(self, instruction: shard.Sum) -> Out:
        for bucket in self.store.by_bucket:
            if self._summed.get(bucket) != self.machine.version:
                self._sum(bucket, list(instruction.workers))
        message = Message(Kind.summed, clock=instruction.clock)
        if not self.shared:
            held, squares = self.store.squares()
            words = {"blocks": held, "squares": squares}
            fragments = self.store.fragments(self._total).numpy()
            message = Message(Kind.summed, clock=instruction.clock, words=words, data=fragments)
        return [(worker, message) for worker in instruction.workers]

    def _replica(self, worker: int) -> Tensor | None:
        """Where a worker reads weights that change under way."""
        return self.store.memory.replicas[worker] if self.store.memory.replicas else None

    def _apply(self, instruction: shard.Apply, into: Tensor | None) -> None:
        """``into``: a replica that gets the new weights in the same pass over memory."""
        assert self.setup is not None
        commit = self._arrived[instruction.worker].commit
        flat = self._total if self.setup.synchronous else self.store.operands(instruction.worker)[0]
        if commit["factor"] != 1.0:
            self.store.scale(flat, commit["factor"])
        self.store.apply(flat, commit["groups"], commit["share"], commit["unused"], into)
        self.updates += 1
        if self.setup.synchronous:
            for worker in [w for w, arrived in self._arrived.items() if arrived.clock == instruction.clock]:
                del self._arrived[worker]
            self._summed.clear()
        else:
            del self._arrived[instruction.worker]

    def _grant(self, grant: shard.Grant, *, written: bool) -> Out:
        """``written``: the worker's replica has the newest weights already."""
        assert self.setup is not None
        out: Out = []
        replica = self._replica(grant.worker)
        if replica is not None and not written:
            self.store.copy_weights(replica)
        if not self.shared:
            for number, (first, stop) in enumerate(self.runs):
                weights = self.store.weights_bytes(first, stop)
                if not (self.setup.synchronous and self.setup.ownership):
                    weights = weights.clone()  # others' pushes may change them before these bytes have left
                out.append((grant.worker, Message(Kind.weights, bucket=number, dtype="uint8", data=weights.numpy())))
        words: dict[str, Any] = {"version": grant.version, "ahead": grant.ahead, "last": grant.last}
        data = b""
        if grant.worker == self._lead and self._facts:
            words["rows"] = [[worker, clock, len(row)] for worker, clock, row in self._facts]
            data = b"".join(row for _, _, row in self._facts)
            self._facts.clear()
        out.append((grant.worker, Message(Kind.grant, clock=grant.clock, words=words, data=data)))
        return out

    def _get(self, worker: int) -> Out:
        out: Out = [(worker, state_message(chunk, Kind.state)) for chunk in self.store.state()]
        return [*out, (worker, Message(Kind.done))]


def options(found: Any, like: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group: the keys that the setup had (a scheduler may add its own), plain values."""
    if not isinstance(found, dict) or not set(like) <= set(found) or len(json.dumps(found)) > CHUNK_BYTES:
        raise WireError("options that are not those of the group")
    for name, value in found.items():
        before = like.get(name)
        if isinstance(before, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise WireError(f"option {name} = {value!r:.60}, which is no number")
        if isinstance(before, list) and (not isinstance(value, list) or len(value) != len(before)):
            raise WireError(f"option {name} = {value!r:.60}, which is no list of {len(before)}")
    return found


def state_message(chunk: Chunk, kind: Kind) -> Message:
    words = {"what": "state", "slot": chunk.slot, "start": chunk.start, "key": chunk.key}
    if chunk.value is not None:
        return Message(kind, words={**words, "value": chunk.value})
    words |= {"shape": list(chunk.shape), "dtype": chunk.dtype, "offset": chunk.offset}
    data = chunk.data.numpy() if isinstance(chunk.data, Tensor) else chunk.data
    return Message(kind, words=words, dtype="uint8", data=data)


def chunk_of(message: Message) -> Chunk:
    """Raises WireError for one that makes no sense."""
    words = message.words
    slot, start = wire.whole(words, "slot"), wire.whole(words, "start")
    key = wire.text(words, "key")
    if "value" in words:
        return Chunk(slot, start, key, words["value"])
    shape = wire.wholes(words, "shape", most=1 << 40)
    dtype = wire.text(words, "dtype")
    if dtype not in wire.DTYPES[1:] or len(shape) > 16:
        raise WireError(f"a state of {dtype!r:.60}")
    size = wire.SIZES[wire.DTYPES.index(dtype)]
    for length in shape:
        size *= length
    offset = wire.whole(words, "offset", 0, size)
    data = _bytes(message)
    if offset + len(data) > size or size > 1 << 42:
        raise WireError("a piece of a state that lies beyond its end")
    return Chunk(slot, start, key, None, tuple(shape), dtype, offset, data)


def _bytes(message: Message) -> Tensor:
    """The data as uint8, sharing their memory."""
    if not len(message.data):
        return torch.empty(0, dtype=torch.uint8)
    view = memoryview(message.data)
    if view.readonly:  # torch warns of memory that must not be written to; this is only read
        return torch.frombuffer(bytearray(view), dtype=torch.uint8)
    return torch.frombuffer(view, dtype=torch.uint8)
