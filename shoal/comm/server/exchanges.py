"""Exchanges (see shoal.comm.exchange for the protocol) whose sums go to parameter servers, or to nobody."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.comm.accounting.account import Account
from shoal.comm.accounting.clocks import clock_name
from shoal.comm.accounting.counters import Kind
from shoal.comm.accounting.moments import Moments
from shoal.comm.exchange import Placement, Terms
from shoal.comm.finishing import finish_flat
from shoal.comm.group import Group, HostGroup
from shoal.comm.layout import BLOCK
from shoal.comm.server.client import Client, Grant
from shoal.comm.status import Phase
from shoal.comm.tree import Add


class OwnPlacement(Placement):
    """Of a worker that adds up its own shards and nobody else's."""

    def __init__(self, own: range) -> None:
        super().__init__([own], 0, fast=False)

    def seen(self, passes: Sequence[int]) -> tuple[int, ...]:
        own = self.ownership[0]
        return tuple(count if leaf in own else 0 for leaf, count in enumerate(passes))

    def partials(self, passes: Sequence[int]) -> list[int]:
        return super().partials(self.seen(passes))

    def _adds(self, passes: tuple[int, ...]) -> list[Add]:
        return super()._adds(self.seen(passes)) if any(self.seen(passes)) else []


class _Own:
    """What these exchanges share: gradients are copied into buffers of this worker's, and never adopted."""

    shared_result = sliced_result = False
    keeps_sums = True
    result: Tensor

    def __init__(self, group: Group, terms: Terms) -> None:
        self.group, self.terms = group, terms
        self.layout, self.placement, self._denominators = terms.layout, terms.placement, terms.denominators
        self.facts = torch.zeros(terms.facts, dtype=torch.float64)
        self.all_facts = torch.zeros(len(self.placement.ownership), terms.facts, dtype=torch.float64)
        shared = isinstance(group, HostGroup) and group.servers is not None
        link = "shared memory" if shared else "servers"
        operations = (("push", link), ("pull", link))
        bucket_bytes = [bucket.slice * bucket.workers * terms.dtype.itemsize for bucket in self.layout.buckets]
        self.account = Account(group.counters, group.report, operations, bucket_bytes)
        self.rows = np.zeros((group.world, self.account.form.width))
        self.partials: Sequence[Tensor] = ()
        self.client: Client | None = None
        self.clock = 0  # steps that have been finished since this exchange was made
        self.factor = 1.0
        self._passes: tuple[int, ...] = ()
        self._posted = 0

    def connect(self, client: Client) -> None:
        """Before the first step, with a client that the servers have welcomed."""
        self.client = client

    @property
    def _servers(self) -> Client:
        assert self.client is not None, "connect comes before the first step"
        return self.client

    def begin(self, passes: tuple[int, ...]) -> None:
        row = self.account.begin()
        self.rows[self.group.rank, : len(row)], self.rows[self.group.rank, len(row) :] = row, 0.0
        self._passes = passes
        self._posted, self.factor = 0, 1.0

    def claim(self) -> None:
        """Nobody reads the buffers once the weights of the step have come, which is before its first forward pass."""

    def inside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def adopt(self, buffer: int, slot: int, gradient: Tensor) -> bool:
        return False

    def advance(self) -> None:
        """Others reduce, or a bucket is reduced as it is posted."""

    def result_of(self, slot: int) -> Tensor:
        place = self.layout.slots[slot]
        return self.result[place.offset : place.offset + place.size]

    def scale(self, factor: float) -> None:
        """The servers scale, when the step is committed."""
        self.factor = factor

    def arrive(self) -> Grant | None:
        """Wait for the weights that were asked for, if any were."""
        asked = self.account.now()
        grant = self._servers.arrive()
        if grant is not None:
            pulls = self.account.tallies[1]
            pulls.call(received=self._servers.take_received())
            pulls.spend(Kind.transferring, self.account.now() - asked, exposed=True)
        return grant


class OwnSum(_Own):
    """The mean gradient of this worker's own shards; it is reduced bucket by bucket, as these become ready."""

    def __init__(self, group: Group, terms: Terms) -> None:
        super().__init__(group, terms)
        self._squares = torch.zeros(self.layout.elements // BLOCK, dtype=torch.float64)
        count = max(1, terms.partials()[0])
        self._buffers = [torch.zeros(self.layout.elements, dtype=terms.dtype) for _ in range(count)]
        self.result = self._buffers[0]

    def begin(self, passes: tuple[int, ...]) -> None:
        super().begin(passes)
        self.partials = self._buffers[: self.placement.partials(passes)[0]]
        self._adds = self.placement.adds(passes)

    @torch.no_grad()
    def post(self) -> None:
        bucket, start_of_state = self.layout.buckets[self._posted], self.layout.state_start
        self.account.posted(self._posted)
        self.account.reduces(self._posted)
        mean, _ = self._denominators(self.facts.unsqueeze(0))
        own = float(sum(1 for leaf in self.placement.ownership[0] if self._passes[leaf]))  # shards with samples
        middle = min(max(start_of_state, bucket.start), bucket.stop)
        for start, stop, divisor in ((bucket.start, middle, mean), (middle, bucket.stop, own)):
            if start == stop:
                continue
            squares = self._squares[start // BLOCK : stop // BLOCK] if start < start_of_state else None
            if self.partials:
                finish_flat([buffer[start:stop] for buffer in self.partials], self._adds, divisor, squares)
            else:  # no shard of this worker has a sample in this step
                self.result[start:stop].zero_()
                self._squares[start // BLOCK : stop // BLOCK].zero_()
        self.account.reduced(self._posted)
        self._reduced(self._posted)
        self._posted += 1

    def _reduced(self, bucket: int) -> None:
        """A bucket of the mean is final."""

    def finish(self) -> torch.Tensor:
        self.account.finishes()
        self.all_facts[0] = self.facts
        self.account.settle()
        self.clock += 1
        return self._squares


class LocalExchange(OwnSum):
    """For workers that average their weights now and then: a step is nobody else's business."""

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        self.result[: self.layout.state_start].mul_(factor)


class StaleExchange(OwnSum):
    """Own means go to servers that apply each when it comes; workers are a bounded number of steps apart."""

    def connect(self, client: Client) -> None:
        super().connect(client)
        self._buffers[0] = self.result = client.operands()[0]

    def _reduced(self, bucket: int) -> None:
        sent = self._servers.push(self.clock, bucket, [self.result], [1.0], [1])
        self.account.tallies[0].call(sent=sent)

    def commit(
        self, groups: Sequence[Mapping[str, Any]], unused: Sequence[int], *, share: float, stop: bool, row: bytes
    ) -> None:
        """Have the finished step applied. ``share``: of this worker in the global batch; its learning rate is scaled
        by it. ``row``: what the lead is to know of the step."""
        factor = self.factor
        self._servers.commit(self.clock - 1, groups, factor=factor, share=share, unused=unused, stop=stop, row=row)


class ServedExchange(_Own):
    """Every step is one round of all workers: partial sums go to the servers, which finish the canonical tree."""

    def __init__(self, group: Group, terms: Terms) -> None:
        super().__init__(group, terms)
        clocks = [name.decode() for name in group.gather(clock_name().encode())]
        self._moments = Moments(self.account, clocks)

    def connect(self, client: Client) -> None:
        super().connect(client)
        self._buffers = client.operands()
        self.result = torch.zeros(self.layout.elements, dtype=self.terms.dtype)

    def begin(self, passes: tuple[int, ...]) -> None:
        super().begin(passes)
        self._moments.tell(self.rows[self.group.rank].copy())
        counts = self.placement.partials(passes)
        self.partials = self._buffers[: counts[self.group.rank]]
        memory = self._servers.memory
        if memory is not None:  # the total ends up in the first worker's first buffer
            owner = next(rank for rank, count in enumerate(counts) if count)
            self.result = memory.operands[owner][0]

    def post(self) -> None:
        self.account.posted(self._posted)
        counts = self.facts[len(self.facts) - len(self._passes) :].tolist()
        sent = self._servers.push(self.clock, self._posted, self.partials, counts, self._passes)
        self.account.tallies[0].call(sent=sent)
        self._posted += 1

    def finish(self) -> torch.Tensor:
        self.account.finishes()
        before = self.group.report.position
        self.group.report(Phase.exchanging)
        mine = np.empty(len(self.facts) + self._moments.width)
        mine[: len(self.facts)] = self.facts.numpy()
        self._moments.write(mine[len(self.facts) :])
        rows = np.stack([np.frombuffer(row) for row in self.group.gather(mine.tobytes())])
        seen = self.account.now()
        self.all_facts.copy_(torch.from_numpy(rows[:, : len(self.facts)]))
        self.rows = self._moments.accounts(rows[:, len(self.facts) :])
        squares = self._servers.sums(self.clock, self.result)
        self.group.report(before.phase, shard=before.shard)
        for bucket in range(len(self.layout.buckets)):
            self.account.reduces(bucket)
            self.account.reduced(bucket)
        self._moments.read(rows[:, len(self.facts) :], seen)
        self.account.settle()
        self.clock += 1
        if self._servers.memory is None and not bool(squares.isfinite().all()):
            bad = (~squares.isfinite()).nonzero().flatten().tolist()  # so that a parameter can be named
            for block in bad:
                self.result[block * BLOCK : (block + 1) * BLOCK] = torch.nan
        return squares

    def take_back(self) -> None:
        """Instead of `commit`: the finished round is nobody's business, and done again. Called by all."""
        self.clock -= 1
        self._servers.retract(self.clock)

    def commit(self, groups: Sequence[Mapping[str, Any]], unused: Sequence[int]) -> None:
        """Have the finished round applied; the first worker's word counts."""
        self._servers.commit(self.clock - 1, groups, factor=self.factor, unused=unused)
