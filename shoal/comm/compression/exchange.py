"""Training with compressed gradients: the exchanges of `Plan.compression` (shoal.comm.exchange is the protocol).

Each bucket of the flat buffer is one compressed reduction. Buffers such as BatchNorm's statistics go as they are.
Lossy: what a step leaves unsent is kept in this process and added to the next step (`kept_by`).
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.comm.accounting.account import Account, stand
from shoal.comm.accounting.counters import Kind
from shoal.comm.compression.compressor import COMPRESSORS, Compressor, Shapes
from shoal.comm.compression.links import HostLinks, Links, TorchLinks
from shoal.comm.compression.reduction import MOST_STAGES, Division, Line, RawReduction, Steps
from shoal.comm.compression.worth import Verdict, agreed, on_one_host
from shoal.comm.distributed import DistributedExchange, DistributedGroup
from shoal.comm.exchange import Exchange, Terms, cuts
from shoal.comm.finishing import block_squares
from shoal.comm.group import Group, HostGroup
from shoal.comm.layout import Bucket, Layout
from shoal.errors import UserError

_DONE = 3  # message kind of the last barrier of a step
_WHEN = struct.Struct("<d")


def compressed_exchange(
    name: str,
    group: Group,
    terms: Terms,
    *,
    shapes: Shapes = (),
    force: bool = False,
) -> Exchange:
    """The exchange for ``compression = name``. Called by every worker; raises UserError where compressing does not pay.

    ``shapes``: of the parameters, in the layout's order, for PowerSGD. ``force``: compress all the same."""
    if terms.dtype != torch.float32:
        raise UserError(
            f"plan: compression = {name!r} takes float32 gradients, this model's are {terms.dtype}: leave it out."
        )
    device = terms.device
    compressor = COMPRESSORS[name](min_bytes=0, force=force)
    if isinstance(group, HostGroup):
        if device.type != "cpu" and group.world > 1:
            raise UserError(
                "several workers with GPUs are started by torchrun: torchrun --nproc-per-node N -m shoal train"
            )
        mine = on_one_host(compressor, group.world)
        told = json.loads(group.gather(json.dumps([mine.yes, mine.why]).encode())[0])  # rank 0's, for all
        _insist(Verdict(*told), "the workers share this host's memory, and " if group.world > 1 else "")
        return HostExchange(group, terms, compressor, shapes)
    if not isinstance(group, DistributedGroup):
        raise UserError(f"no compressed exchange works over a {type(group).__name__}.")
    links = TorchLinks(group.pg, device, MOST_STAGES, group.patience)
    group.lend(links.groups)
    _insist(agreed(compressor, links, device))
    links.sent_bytes = 0  # measuring does not count
    return TorchExchange(group, terms, compressor, links, shapes)


def kept_by(exchange: Exchange) -> dict[str, Tensor]:
    """What this worker carries from step to step, by name: views, not copies. {} of an exchange without compression."""
    return exchange.pieces.state() if isinstance(exchange, HostExchange | TorchExchange) else {}


def _insist(verdict: Verdict, where: str = "") -> None:
    if not verdict:
        raise UserError(
            f"plan: compression is refused: {where}{verdict.why}. Leave it out, or --set compression_force=true."
        )


def shapes_between(layout: Layout, shapes: Shapes, start: int, stop: int) -> list[tuple[int, ...]]:
    """What lies in a part of the flat buffer, one after the other: whole rows of parameters as matrices, and the rest.

    ``shapes`` are those of the first slots."""
    found: list[tuple[int, ...]] = []
    at = start
    for slot, shape in zip(layout.slots, shapes, strict=False):
        row = slot.size // shape[0] if len(shape) > 1 and slot.size else 0
        if not row:
            continue
        first = max(0, -(-(start - slot.offset) // row))  # whole rows of the slot from here ...
        last = min(shape[0], (stop - slot.offset) // row)  # ... to here lie inside
        if first < last:
            begin = slot.offset + first * row
            found += [(begin - at,), (last - first, row)]
            at = begin + (last - first) * row
    return [shape for shape in [*found, (stop - at,)] if math.prod(shape)]


@dataclass(frozen=True)
class _Piece:
    """A part of a bucket that is reduced as one."""

    start: int  # in the flat buffer
    stop: int
    of_gradients: bool
    division: Division


class _Pieces:
    """The reductions of every bucket."""

    def __init__(
        self, compressor: Compressor, layout: Layout, shapes: Shapes, links: Links, device: torch.device
    ) -> None:
        self._links = links
        self._of_bucket: list[list[_Piece]] = []
        for bucket in layout.buckets:
            pieces = []
            for start, stop in cuts(layout, bucket.start, bucket.stop):
                if start < layout.state_start:
                    division = compressor.division(shapes_between(layout, shapes, start, stop), links, device)
                else:
                    division = Division([(range(stop - start), RawReduction(stop - start, links, device))])
                pieces.append(_Piece(start, stop, start < layout.state_start, division))
            self._of_bucket.append(pieces)
        self.line = Line(links)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{bucket}/{piece.start}/{name}": tensor
            for bucket, pieces in enumerate(self._of_bucket)
            for piece in pieces
            for name, tensor in piece.division.state().items()
        }

    def start(
        self, bucket: int, result: Tensor, denominators: Callable[[], tuple[float, float]], meter: "_Meter"
    ) -> None:
        """Begin with what lies in ``result``, which becomes the mean."""
        for piece in self._of_bucket[bucket]:
            divisor = (lambda: denominators()[0]) if piece.of_gradients else (lambda: denominators()[1])
            for cut, reduction in piece.division.parts:
                numbers = result[piece.start + cut.start : piece.start + cut.stop]
                self.line.start(_metered(reduction.steps(numbers, divisor), bucket, self._links, meter))
                self.line.advance()


@dataclass(frozen=True)
class _Meter:
    """What an account is told of a bucket: its operands are here; its sum is made; bytes have gone to the others."""

    arrived: Callable[[int], None]
    summed: Callable[[int], None]
    sent: Callable[[int, int], None]  # (number of the transfer, bytes)


def _metered(steps: Steps, bucket: int, links: Links, meter: _Meter) -> Steps:
    before = links.sent_bytes
    for number, handle in enumerate(steps):
        if number == 1:
            meter.summed(bucket)
        meter.sent(number, links.sent_bytes - before)
        yield handle
        if number == 0:
            meter.arrived(bucket)
        before = links.sent_bytes


def _begin_bucket(bucket: Bucket, partials: Sequence[Tensor], result: Tensor) -> None:
    piece = result[bucket.start : bucket.stop]
    if partials:
        piece.copy_(partials[0][bucket.start : bucket.stop])
    else:
        piece.zero_()  # no samples: but what earlier steps left unsent still goes out


class TorchExchange(DistributedExchange):
    """Workers that others started: payloads over torch.distributed."""

    def __init__(
        self, group: DistributedGroup, terms: Terms, compressor: Compressor, links: TorchLinks, shapes: Shapes
    ) -> None:
        super().__init__(group, terms)
        self.pieces = _Pieces(compressor, terms.layout, shapes, links, terms.device)
        self._meter = _Meter(self.account.reduces, self.account.reduced, self._sent)

    def _sent(self, number: int, nbytes: int) -> None:
        self._count("all-gather" if number % 2 else "reduce-scatter", nbytes / max(1, self._group.world - 1))

    @torch.no_grad()
    def _scatter(self, bucket: Bucket) -> None:
        _begin_bucket(bucket, self.partials, self._result)
        self.pieces.start(self._posted, self._result, self._known, self._meter)

    def _known(self) -> tuple[float, float]:
        """The denominators, once every worker's first facts are here."""
        if self._facts_work is not None:
            self._facts_work.wait()
            self._facts_work = None
        return self._denominators(self._early_facts)

    @torch.no_grad()
    def _advance(self, *, wait: bool) -> None:
        if not wait:
            self.pieces.line.advance()
            return
        begun = self.account.now()
        self.pieces.line.finish()
        begun = max(begun, *self.account.times.reduced)  # from when on there was nothing to add up
        link = self._links[0]
        tally = self.account.tallies[self.account.form.operations.index(("all-gather", link))]
        tally.spend(Kind.transferring, max(0.0, self.account.now() - begun), exposed=True)


class HostExchange:
    """Workers that one agent forked on this host: payloads on their heap. It never pays; for those who insist."""

    shared_result = sliced_result = False
    keeps_sums = True

    def __init__(self, group: HostGroup, terms: Terms, compressor: Compressor, shapes: Shapes) -> None:
        self.layout, self._placement, self._denominators = terms.layout, terms.placement, terms.denominators
        layout, facts, device = terms.layout, terms.facts, terms.device
        self._group, self._mesh = group, group.mesh
        self._facts = group.heap.tensor(group.world * facts, torch.float64).view(group.world, facts)
        self.facts = self._facts[group.rank]
        self.all_facts = torch.empty_like(self._facts)
        bucket_bytes = [bucket.slice * group.world * 4 for bucket in layout.buckets]
        link = "shared memory"
        operations = (("reduce-scatter", link), ("all-gather", link), ("barrier", link))
        self.account = Account(group.counters, group.report, operations, bucket_bytes)
        shape = (group.world, self.account.form.width)
        self._rows = group.heap.tensor(shape[0] * shape[1], torch.float64).view(shape).numpy()
        self.rows = np.zeros(shape)
        self._links = HostLinks(group, lambda: _WHEN.pack(self.account.now()))
        self.pieces = _Pieces(compressor, layout, shapes, self._links, device)
        self._meter = _Meter(self._arrived, self.account.reduced, self._sent)
        self._partial = torch.zeros(layout.elements, device=device)
        self._result = torch.zeros(layout.elements, device=device)
        self.partials: Sequence[Tensor] = ()
        self._posted = self._step = 0

    def begin(self, passes: tuple[int, ...]) -> None:
        owns = self._placement.partials(passes)[self._group.rank]
        self.partials = (self._partial,)[:owns]
        self._posted = 0
        row, me = self.account.begin(), self._group.rank
        self._rows[me, : len(row)], self._rows[me, len(row) :] = row, 0.0

    def claim(self) -> None:
        """Every buffer here is this worker's own."""

    def inside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def adopt(self, buffer: int, slot: int, gradient: Tensor) -> bool:
        """What is compressed is a bucket of the flat buffer: a gradient must lie there."""
        return False

    @torch.no_grad()
    def post(self) -> None:
        self.account.posted(self._posted)
        _begin_bucket(self.layout.buckets[self._posted], self.partials, self._result)
        self.pieces.start(self._posted, self._result, lambda: self._denominators(self._facts), self._meter)
        self._posted += 1

    def _arrived(self, bucket: int) -> None:
        for rank in self._mesh.others:
            self.account.peer_posted(bucket, rank, *_WHEN.unpack(self._links.heard[rank]))
        self.account.reduces(bucket, in_place=True)

    def _sent(self, number: int, nbytes: int) -> None:
        self.account.tallies[number % 2].call(sent=nbytes, received=nbytes)

    def advance(self) -> None:
        """Messages come in the order of the stages: all but the first stage is done at the end."""

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        self.account.finishes()
        self.pieces.line.finish()
        self.all_facts.copy_(self._facts)  # all have posted their last bucket: the rows are complete
        if self._group.rank == 0:
            self.rows[:] = self._rows
        self._barrier()
        self.account.settle()
        return block_squares(self._result[: self.layout.state_start])

    def _barrier(self) -> None:
        """All have read everything: payloads and facts may be written again."""
        asked = self.account.now()
        self._step += 1
        self._mesh.broadcast(_DONE, self._step, _WHEN.pack(asked))
        last, late = asked, self._group.rank
        for rank in self._mesh.others:
            (sent,) = _WHEN.unpack(self._mesh.receive(rank, _DONE, self._step))
            if sent > last:
                last, late = sent, rank
        tally = self.account.tallies[2]
        tally.call()
        stand(tally, asked, last, late, self.account.now())

    def result_of(self, slot: int) -> Tensor:
        place = self.layout.slots[slot]
        return self._result[place.offset : place.offset + place.size]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        self._result[: self.layout.state_start].mul_(factor)
