"""Workers that others started (torchrun, Slurm, Kubernetes): the same exchange over torch.distributed.

Each owner gets its slice of every partial sum by an all-to-all, finishes the tree, and all-gathers the result: gloo
between processors, NCCL between GPUs. With aligned placements this moves what reduce-scatter + all-gather move.
"""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shoal.comm.exchange import Denominators, Placement, divide, global_norm
from shoal.comm.layout import BLOCK, Bucket, Layout
from shoal.comm.status import Phase, Reporter
from shoal.errors import RunFailed

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
PRESENCE_S = 1.0  # how often a worker writes down where it is


class DistributedGroup:
    """A Group over torch.distributed's default process group."""

    def __init__(self, hang_after_s: float, *, accelerator: bool) -> None:
        backend = "cpu:gloo,cuda:nccl" if accelerator else "gloo"
        self.patience = timedelta(seconds=hang_after_s)
        dist.init_process_group(backend, timeout=self.patience)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.host = socket.gethostname()
        self.report = Reporter(self.rank, os.getpid(), None)
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
        with self.explained("a gather"):
            sizes = torch.zeros(self.world, dtype=torch.int64)
            _all_gather(sizes, torch.tensor([len(payload)]))
            longest = int(sizes.max())
            padded = torch.zeros(max(1, longest), dtype=torch.uint8)
            if payload:
                padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            rows = torch.zeros(self.world * len(padded), dtype=torch.uint8)
            _all_gather(rows, padded)
            table = rows.view(self.world, -1)
            return [bytes(table[rank, : int(sizes[rank])].numpy()) for rank in range(self.world)]

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
            for rank in range(self.world):
                try:
                    rows.append(self._store.get(str(rank)).decode().split("|", 3))
                except Exception:
                    rows.append(["0", "?", "?", "unknown: the rendezvous store is gone"])
            return rows

        before = read()
        self._leave.wait(2 * PRESENCE_S)
        lines = []
        for rank, (old, new) in enumerate(zip(before, read(), strict=True)):
            silent = rank != self.rank and old[0] == new[0]
            lines.append(f"rank {rank} on {new[1]} (pid {new[2]}) {'is silent, last' if silent else 'is'} at {new[3]}")
        return sorted(lines, key=lambda line: "silent" not in line)

    def close(self) -> None:
        self._leave.set()
        self._thread.join()
        if dist.is_initialized():
            dist.destroy_process_group()


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
                f"rank {me.rank} on {me.host} lost its peers at step {me.report.position.step} in {self._action}: "
                f"{'; '.join(me.positions())} ({cause})"
            ) from error


class DistributedExchange:
    """See shoal.comm.exchange for the protocol."""

    shared_result = False
    alone = False

    def __init__(
        self,
        group: DistributedGroup,
        layout: Layout,
        placement: Placement,
        most_passes: tuple[int, ...],
        facts: int,
        denominators: Denominators,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout, self._placement, self._denominators = layout, placement, denominators
        self._group = group
        # Collectives of one group are matched by their order. When a result can go out depends on what has come in, so
        # that workers start these in another order among the scatters: they need a group of their own.
        self._results = dist.new_group(timeout=group.patience)
        self._eager = group.world > 1 and device.type == "cpu"  # NCCL's own order must be equal on all workers too
        self.facts = torch.zeros(facts, dtype=torch.float64)
        self.all_facts = torch.zeros(group.world, facts, dtype=torch.float64)
        self._early_facts = torch.zeros_like(self.all_facts)
        counts = placement.partials(most_passes)
        self._buffers = [torch.zeros(layout.elements, dtype=dtype, device=device) for _ in range(counts[group.rank])]
        largest = max(bucket.slice for bucket in layout.buckets)
        self._arrived = torch.zeros(len(layout.buckets) * sum(counts) * largest, dtype=dtype, device=device)
        self._result = torch.zeros(layout.elements, dtype=dtype, device=device)
        self.result = self._result
        self.partials: Sequence[torch.Tensor] = ()
        self._passes: tuple[int, ...] = ()
        self._posted = self._reduced = 0
        self._facts_work: dist.Work | None = None
        self._late_work: dist.Work | None = None
        self._scatters: list[list[dist.Work]] = []
        self._operands: list[list[torch.Tensor]] = []
        self._gathers: list[dist.Work] = []

    def begin(self, passes: tuple[int, ...]) -> None:
        self._passes = passes
        self._counts = self._placement.partials(passes)
        self.partials = self._buffers[: self._counts[self._group.rank]]
        self._posted = self._reduced = 0
        self._scatters, self._operands, self._gathers = [], [], []

    def claim(self) -> None:
        """Every buffer here is this worker's own."""

    def post(self) -> None:
        with self._group.explained("the gradient exchange"):
            if self._posted == 0:
                self._facts_work = self._gather_facts(self._early_facts)
            if self._posted == len(self.layout.buckets) - 1:
                self._late_work = self._gather_facts(self.all_facts)
            self._scatter(self.layout.buckets[self._posted])
            self._posted += 1

    def _gather_facts(self, into: torch.Tensor) -> "dist.Work | None":
        work: dist.Work | None = _all_gather(into.view(-1), self.facts.clone(), async_op=True)
        return work

    def _scatter(self, bucket: Bucket) -> None:
        """Send every owner its slice of the own partials; slices of rank r's i-th partial arrive in round i."""
        world, size = self._group.world, bucket.slice
        operands: list[list[torch.Tensor]] = [[] for _ in range(world)]
        works: list[dist.Work] = []
        free = self._arrived[len(self._scatters) * (len(self._arrived) // len(self.layout.buckets)) :]
        for i in range(max(self._counts)):
            origins = [rank for rank in range(world) if self._counts[rank] > i]
            sends = self._group.rank in origins
            out, free = free[: len(origins) * size], free[len(origins) * size :]
            work = dist.all_to_all_single(
                out,
                self.partials[i][bucket.start : bucket.stop] if sends else out[:0],
                [size if rank in origins else 0 for rank in range(world)],
                [size if sends else 0] * world,
                async_op=True,
            )
            assert work is not None
            works.append(work)
            for origin, piece in zip(origins, torch.split(out, size), strict=True):
                operands[origin].append(piece)
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
            self._reduce(self._reduced)
            self._reduced += 1

    @torch.no_grad()
    def _reduce(self, index: int) -> None:
        bucket, operands = self.layout.buckets[index], self._operands[index]
        denominators = self._denominators(self._early_facts)
        for add in self._placement.adds(self._passes):
            operands[add.into].add_(operands[add.other])
        first = bucket.owned(self._group.rank).start
        for start in range(0, bucket.slice, BLOCK):
            divide(operands[0][start : start + BLOCK], first + start, self.layout, denominators)
        whole = self._result[bucket.start : bucket.stop]
        work = _all_gather(whole, operands[0], async_op=True, group=self._results)
        assert work is not None
        self._gathers.append(work)

    @torch.no_grad()
    def finish(self) -> float:
        before = self._group.report.position
        self._group.report(Phase.exchanging)
        with self._group.explained("the gradient exchange"):
            self._advance(wait=True)
            for work in [self._late_work, *self._gathers]:
                if work is not None:
                    work.wait()
        self._group.report(before.phase, shard=before.shard)
        blocks = self._result[: self.layout.state_start].view(-1, BLOCK)
        return global_norm(torch.stack([torch.dot(block, block) for block in blocks]).double().tolist())

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        self._result[: self.layout.state_start].mul_(factor)


class ReducingExchange(DistributedExchange):
    """Fast mode: the backend's own all-reduce, in the order that it likes."""

    def _scatter(self, bucket: Bucket) -> None:
        piece = self._result[bucket.start : bucket.stop]
        if self.partials:
            piece.copy_(self.partials[0][bucket.start : bucket.stop])
        else:
            piece.zero_()
        work = dist.all_reduce(piece, async_op=True)
        assert work is not None
        self._scatters.append([work])

    @torch.no_grad()
    def _reduce(self, index: int) -> None:
        bucket = self.layout.buckets[index]
        denominators = self._denominators(self._early_facts)
        cut = min(max(self.layout.state_start, bucket.start), bucket.stop)
        if bucket.start < cut:
            divide(self._result[bucket.start : cut], bucket.start, self.layout, denominators)
        if cut < bucket.stop:
            divide(self._result[cut : bucket.stop], cut, self.layout, denominators)
