"""Workers that others started (torchrun, Slurm, Kubernetes): the same exchange over torch.distributed.

Each owner gets its slice of every partial sum by an all-to-all, finishes the tree, and all-gathers the result: gloo
between processors, NCCL between GPUs. With aligned placements this moves what reduce-scatter + all-gather move.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from datetime import timedelta
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional

from shoal.comm.accounting.account import Account
from shoal.comm.accounting.clocks import clock_name
from shoal.comm.accounting.counters import Counters, Kind, Place
from shoal.comm.accounting.moments import Moments
from shoal.comm.exchange import Terms, cuts, denominator
from shoal.comm.finishing import block_squares, finish_flat
from shoal.comm.group import Partition
from shoal.comm.lanes import LanedGroup, ProcessGroupLane, Work
from shoal.comm.layout import Bucket
from shoal.comm.status import Phase, Reporter
from shoal.comm.torch_all_gather import all_gather
from shoal.errors import RunFailed, UserError

# torch.distributed.nn.functional is imported above, before there is a group: the defaults of its functions hold the
# default group of that moment for ever, with its threads. The first optimiser that is made imports it too.
PROBES = 5  # gathers that are timed before the first step
PRESENCE_S = 1.0  # how often a worker writes down where it is


class DistributedGroup:
    """A Group over torch.distributed: its default process group, or a part of it."""

    def __init__(self, hang_after_s: float, *, accelerator: bool) -> None:
        backend = "cpu:gloo,cuda:nccl" if accelerator else "gloo"
        self.patience = timedelta(seconds=hang_after_s)
        dist.init_process_group(backend, timeout=self.patience)
        self.pg: dist.ProcessGroup | None = None  # None: the default one
        self._whole = self
        self._parts: list[DistributedGroup] = []  # all that were made by `split`, of this one and of those
        self._lent: list[list[dist.ProcessGroup | None]] = []
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.names = tuple(range(self.world))  # what its ranks are called among all workers of the run
        self.host = socket.gethostname()
        self.report = Reporter(self.rank, os.getpid(), None)
        self.counters = Counters.of_workers(self.rank, self.names)
        self._gathers = self.counters.tally("gather", "tcp")
        self._listener: Callable[[Any], None] = lambda message: None
        self._stop = threading.Event()
        self._leave = threading.Event()
        store = dist.distributed_c10d._get_default_store()
        self._store = torch._C._distributed_c10d.PrefixStore("shoal-presence", store)
        self._beat = 0
        self._thread = threading.Thread(target=self._keep_present, name="shoal-presence", daemon=True)
        self._thread.start()

    def ask_stop(self) -> None:
        self._stop.set()

    @property
    def stop_asked(self) -> bool:
        return self._stop.is_set()

    def gather(self, payload: bytes) -> list[bytes]:
        begun = self.counters.clock()
        with self.explained("a gather"):
            sizes = torch.zeros(self.world, dtype=torch.int64)
            all_gather(sizes, torch.tensor([len(payload)]), group=self.pg)
            longest = int(sizes.max())
            padded = torch.zeros(max(1, longest), dtype=torch.uint8)
            if payload:
                padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            rows = torch.zeros(self.world * len(padded), dtype=torch.uint8)
            all_gather(rows, padded, group=self.pg)
            moved = (self.world - 1) * (len(padded) + 8)
            self._gathers.call(sent=moved, received=moved)
            self._gathers.spend(Kind.transferring, self.counters.clock() - begun, exposed=True)
            table = rows.view(self.world, -1)
            return [bytes(table[rank, : int(sizes[rank])].numpy()) for rank in range(self.world)]

    def split(self, partition: Partition) -> "DistributedGroup":
        """See Group. torch.distributed wants every worker of the run to take part: parts are split alike."""
        made = copy(self)
        for part in self._all_parts(partition):
            pg = _process_group(part, self.patience)
            if self.names[self.rank] in part:
                made.pg, made.names = pg, part
        self._parts.append(made)
        made.rank, made.world = made.names.index(self.names[self.rank]), len(made.names)
        made.counters = Counters.of_workers(made.rank, made.names)
        made._gathers = made.counters.tally("gather", "tcp")
        self.counters.adopt(made.counters)
        return made

    def _all_parts(self, partition: Partition) -> list[tuple[int, ...]]:
        """The parts of this group and of those that were made with it, by the names of their ranks."""
        mine = [tuple(self.names[rank] for rank in part) for part in partition]
        if self.pg is None:
            return mine
        told = [json.loads(row) for row in self._whole.gather(json.dumps(mine).encode())]
        return list(dict.fromkeys(tuple(part) for parts in told for part in parts))

    def lane(self, *, shared: bool = False) -> ProcessGroupLane:
        return ProcessGroupLane(self if shared else self.split([range(self.world)]))

    def listen(self, listener: Callable[[Any], None]) -> None:
        """What this worker emits goes to ``listener``, in this process."""
        self._listener = listener

    def emit(self, message: Any) -> None:
        self._listener(message)

    def _keep_present(self) -> None:
        while not self._leave.is_set():
            self._beat += 1
            with suppress(Exception):  # the store may be gone already; then there is nobody to tell
                self._store.set(str(self.rank), f"{self._beat}|{self.host}|{os.getpid()}|{self.report.position}")
            self._leave.wait(PRESENCE_S)

    def explained(self, action: str) -> "_Explained":
        return _Explained(self, action)

    def positions(self) -> list[str]:
        """Where every worker last said it was, and which of them have fallen silent."""

        def read() -> list[list[str]]:
            rows = []
            for rank in self.names:
                try:
                    rows.append(self._store.get(str(rank)).decode().split("|", 3))
                except Exception:
                    rows.append(["0", "?", "?", "unknown: the rendezvous store is gone"])
            return rows

        before = read()
        self._leave.wait(2 * PRESENCE_S)
        lines = []
        for rank, old, new in zip(self.names, before, read(), strict=True):
            silent = rank != self.names[self.rank] and old[0] == new[0]
            lines.append(f"rank {rank} on {new[1]} (pid {new[2]}) {'is silent, last' if silent else 'is'} at {new[3]}")
        return sorted(lines, key=lambda line: "silent" not in line)

    def lend(self, groups: "list[dist.ProcessGroup | None]") -> None:
        """Whoever keeps process groups in this list has them until the run's group closes, which empties it."""
        self._lent.append(groups)

    def close(self) -> None:
        self._leave.set()
        self._thread.join()
        for groups in self._lent:
            groups.clear()
        for part in self._parts:  # a process group ends its threads when nobody holds it; one that lives on while
            part.pg = None  # the interpreter ends may free a tensor then, and ends the process by SIGABRT
        if dist.is_initialized():
            dist.destroy_process_group()


def _process_group(part: tuple[int, ...], patience: timedelta) -> "dist.ProcessGroup | None":
    """Of these workers of the run, in this order; None for those that are not among them."""
    order: dict[str, Any] = {}
    if list(part) != sorted(part):
        if "sort_ranks" not in signature(dist.new_group).parameters:
            raise UserError(
                f"split: torch {torch.__version__} keeps no order but the ascending one, and part {part} has another: "
                f"give {tuple(sorted(part))}, or take a newer torch."
            )
        order = {"sort_ranks": False}
    made: dist.ProcessGroup | None = dist.new_group(list(part), timeout=patience, **order)
    return made


class _Explained:
    """Turns a backend's bare error into one line: who waits for whom, and where everybody was."""

    def __init__(self, group: DistributedGroup, action: str) -> None:
        self._group, self._action = group, action

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            me = self._group
            cause = " ".join(str(error).split())[:200]
            raise RunFailed(
                f"rank {me.names[me.rank]} on {me.host} lost its peers at step {me.report.position.step} in "
                f"{self._action}: {'; '.join(me.positions())} ({cause})"
            ) from error


class DistributedExchange:
    """See shoal.comm.exchange for the protocol.

    Bytes are counted as the operations move them: all-to-all and all-gather to each peer its part; NCCL and gloo may
    take other ways. With NCCL, times are those of the host's thread."""

    shared_result = sliced_result = False
    keeps_sums = True
    operations: tuple[str, ...] = ("reduce-scatter", "all-gather", "facts")

    def __init__(self, group: LanedGroup, terms: Terms) -> None:
        self.layout, self._placement, self._denominators = terms.layout, terms.placement, terms.denominators
        layout, facts, dtype, device = terms.layout, terms.facts, terms.dtype, terms.device
        self._group = group
        # Collectives of one lane are matched by their order. When a result can go out depends on what has come in, so
        # that workers start these in another order among the scatters: they need a lane of their own.
        self._lane, self._results = group.lane(shared=True), group.lane()
        self._eager = group.world > 1 and device.type == "cpu"  # NCCL's own order must be equal on all workers too
        named = [row.decode().split("|", 1) for row in group.gather(f"{group.host}|{clock_name()}".encode())]
        hosts = [host for host, _ in named]
        self._near = hosts.count(group.host) - 1  # peers on this host
        link = self._lane.link(device)
        self._links = [link] if len(set(hosts)) == 1 else [f"{link} between hosts", f"{link} in a host"]
        operations: list[Place] = [(operation, link) for link in self._links for operation in self.operations]
        bucket_bytes = [bucket.slice * group.world * dtype.itemsize for bucket in layout.buckets]
        numbers = [sorted(set(hosts)).index(host) for host in hosts]
        self.account = Account(group.counters, group.report, operations, bucket_bytes, numbers)
        self.account.latency_s = self._start_cost(device)
        self._moments = Moments(self.account, [clock for _, clock in named])
        self._row = torch.zeros(facts + self._moments.width, dtype=torch.float64)
        self._all_rows = torch.zeros(group.world, len(self._row), dtype=torch.float64)
        self.facts = self._row[:facts]
        self.all_facts = self._all_rows[:, :facts]
        self._early_facts = torch.zeros(group.world, facts, dtype=torch.float64)
        self._reserve(terms)
        self.partials: Sequence[torch.Tensor] = ()
        self._passes: tuple[int, ...] = ()
        self._posted = self._reduced = 0
        self._facts_work: Work | None = None
        self._late_work: Work | None = None
        self._scatters: list[list[Work]] = []
        self._operands: list[list[torch.Tensor]] = []
        self._gathers: list[Work] = []

    def _reserve(self, terms: Terms) -> None:
        """The memory of own partial sums, of what comes in from others, and of the result."""
        layout, dtype, device = terms.layout, terms.dtype, terms.device
        counts = terms.partials()
        mine = counts[self._group.rank]
        self._buffers = [torch.zeros(layout.elements, dtype=dtype, device=device) for _ in range(mine)]
        largest = max(bucket.slice for bucket in layout.buckets)
        self._arrived = torch.zeros(len(layout.buckets) * sum(counts) * largest, dtype=dtype, device=device)
        self._result = torch.zeros(layout.elements, dtype=dtype, device=device)

    @property
    def beside_bytes(self) -> int:
        """What it holds besides partial sums: what comes in of others', and the result."""
        return self._arrived.nbytes + self._result.nbytes

    def _room(self, bucket: int) -> torch.Tensor:
        """Where a bucket's slices from all workers arrive, flat."""
        return self._arrived[bucket * (len(self._arrived) // len(self.layout.buckets)) :]

    def _start_cost(self, device: torch.device) -> float:
        """Seconds that the smallest gather takes, the best of a few, before the first step."""
        one = torch.zeros(1, device=device)
        all_ones = torch.zeros(self._group.world, device=device)
        best = float("inf")
        for _ in range(PROBES):
            begun = self.account.now()
            self._lane.all_gather(all_ones, one).wait()
            float(all_ones[0])  # on a GPU: wait for it
            best = min(best, self.account.now() - begun)
        return best

    def begin(self, passes: tuple[int, ...]) -> None:
        self._passes = passes
        self._counts = self._placement.partials(passes)
        self.partials = self._buffers[: self._counts[self._group.rank]]
        self._posted = self._reduced = 0
        self._scatters, self._operands, self._gathers = [], [], []
        self._moments.tell(self.account.begin())

    @property
    def rows(self) -> np.ndarray:
        """See Exchange."""
        return self._moments.accounts(self._all_rows[:, len(self.facts) :].numpy())

    def _count(self, operation: str, to_each: float, from_each: float | None = None) -> None:
        """An operation that moves so many bytes to and from each peer."""
        received = to_each if from_each is None else from_each
        far = self._group.world - 1 - self._near
        for link, peers in zip(self._links, (far, self._near) if len(self._links) > 1 else (self._near,), strict=True):
            if not peers:
                continue
            tally = self.account.tallies[self.account.form.operations.index((operation, link))]
            tally.call(sent=round(to_each * peers), received=round(received * peers))

    def claim(self) -> None:
        """Every buffer here is this worker's own."""

    def inside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def adopt(self, buffer: int, slot: int, gradient: torch.Tensor) -> bool:
        """What is sent is a bucket of the flat buffer: a gradient must lie there."""
        return False

    def post(self) -> None:
        with self._group.explained("the gradient exchange"):
            self.account.posted(self._posted)
            if self._posted == 0:
                self._facts_work = self._gather_facts(self._early_facts, self.facts)
            if self._posted == len(self.layout.buckets) - 1:
                self._moments.write(self._row[len(self.facts) :].numpy())
                self._late_work = self._gather_facts(self._all_rows, self._row)
            self._scatter(self.layout.buckets[self._posted])
            self._posted += 1

    def _gather_facts(self, into: torch.Tensor, row: torch.Tensor) -> "Work | None":
        work = self._lane.all_gather(into.view(-1), row.clone())
        self._count("facts", row.nbytes)
        return work

    def _scatter(self, bucket: Bucket) -> None:
        """Send every owner its slice of the own partials; slices of rank r's i-th partial arrive in round i."""
        world, size = self._group.world, bucket.slice
        operands: list[list[torch.Tensor]] = [[] for _ in range(world)]
        works: list[Work] = []
        free = self._room(len(self._scatters))
        for i in range(max(self._counts)):
            origins = [rank for rank in range(world) if self._counts[rank] > i]
            sends = self._group.rank in origins
            out, free = free[: len(origins) * size], free[len(origins) * size :]
            works.append(
                self._lane.all_to_all(
                    out,
                    self.partials[i][bucket.start : bucket.stop] if sends else out[:0],
                    [size if rank in origins else 0 for rank in range(world)],
                    [size if sends else 0] * world,
                )
            )
            for origin, piece in zip(origins, torch.split(out, size), strict=True):
                operands[origin].append(piece)
        own, nbytes = self._counts[self._group.rank], size * free.itemsize
        self._count("reduce-scatter", own * nbytes, (sum(self._counts) - own) / max(1, world - 1) * nbytes)
        self._scatters.append(works)
        self._operands.append([piece for row in operands for piece in row])

    def advance(self) -> None:
        if self._eager:
            self._advance(wait=False)

    def _advance(self, *, wait: bool) -> None:
        while self._reduced < self._posted:
            pending = [self._facts_work, *self._scatters[self._reduced]]
            if not wait and not all(work is None or work.is_completed() for work in pending):
                return
            for work in pending:
                if work is not None:
                    work.wait()
            self._facts_work = None
            self.account.reduces(self._reduced)
            self._reduce(self._reduced)
            self.account.reduced(self._reduced)
            self._reduced += 1

    @torch.no_grad()
    def _reduce(self, index: int) -> None:
        bucket, operands = self.layout.buckets[index], self._operands[index]
        denominators = self._denominators(self._early_facts)
        owned = bucket.owned(self._group.rank)
        for start, stop in cuts(self.layout, owned.start, owned.stop):
            parts = [operand[start - owned.start : stop - owned.start] for operand in operands]
            finish_flat(parts, self._placement.adds(self._passes), denominator(start, self.layout, denominators))
        whole = self._result[bucket.start : bucket.stop]
        self._gathers.append(self._results.all_gather(whole, operands[0]))
        self._count("all-gather", operands[0].nbytes)

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        self._complete()
        return block_squares(self._result[: self.layout.state_start])

    def _complete(self) -> None:
        before = self._group.report.position
        self._group.report(Phase.exchanging)
        self.account.finishes()
        with self._group.explained("the gradient exchange"):
            self._advance(wait=True)
            self._wait("facts", [self._late_work])
            self._moments.read(self._all_rows[:, len(self.facts) :].numpy(), self.account.now())
            self._wait("all-gather", self._gathers)
        self.account.settle()
        self._group.report(before.phase, shard=before.shard)

    def _wait(self, operation: str, works: "Sequence[Work | None]") -> None:
        """Stand still until these are done. How much of it is a peer's lateness, their own accounts tell."""
        begun = self.account.now()
        for work in works:
            if work is not None:
                work.wait()
        if works:
            tally = self.account.tallies[self.account.form.operations.index((operation, self._links[0]))]
            tally.spend(Kind.transferring, self.account.now() - begun, exposed=True)

    def result_of(self, slot: int) -> torch.Tensor:
        place = self.layout.slots[slot]
        return self._result[place.offset : place.offset + place.size]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        self._result[: self.layout.state_start].mul_(factor)


class ReducingExchange(DistributedExchange):
    """Fast mode: the backend's own all-reduce, in the order that it likes; counted as a ring."""

    operations = ("all-reduce", "facts")

    def _scatter(self, bucket: Bucket) -> None:
        piece = self._result[bucket.start : bucket.stop]
        if self.partials:
            piece.copy_(self.partials[0][bucket.start : bucket.stop])
        else:
            piece.zero_()
        work = dist.all_reduce(piece, async_op=True, group=cast(DistributedGroup, self._group).pg)
        assert work is not None
        self._count("all-reduce", 2 * piece.nbytes / self._group.world)
        self._scatters.append([work])

    @torch.no_grad()
    def _reduce(self, index: int) -> None:
        bucket = self.layout.buckets[index]
        denominators = self._denominators(self._early_facts)
        for start, stop in cuts(self.layout, bucket.start, bucket.stop):
            finish_flat([self._result[start:stop]], (), denominator(start, self.layout, denominators))
