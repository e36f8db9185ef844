"""One reduction as a sequence of transfers: slices to their owners, summed there, and the sums back to everybody.

A reduction is a generator that yields each transfer when it has been started and goes on when it has come. Whoever runs
it may wait, or see to other reductions meanwhile; `drain` and `Line` are two ways.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.comm.compression.codec import Codec
from shoal.comm.compression.links import Handle, Links
from shoal.errors import UserError

Steps = Generator[Handle, None, None]
Divisor = Callable[[], float]  # asked when the sum is complete
ALIGNMENT = 64  # elements
SEGMENT = 1 << 20  # elements; of a longer vector, one part is compressed while another travels
MOST_STAGES = 4  # transfers of a reduction, one after the other


def slice_size(elements: int, world: int) -> int:
    """Elements that each rank owns; the last ones may own fewer, or none."""
    return -(-elements // world // ALIGNMENT) * ALIGNMENT if elements else 0


def slices(elements: int, world: int) -> list[range]:
    size = slice_size(elements, world)
    return [range(min(elements, rank * size), min(elements, (rank + 1) * size)) for rank in range(world)]


def segments(elements: int) -> list[range]:
    """Parts that are reduced each by itself; one for an empty vector."""
    return [range(start, min(elements, start + SEGMENT)) for start in range(0, max(1, elements), SEGMENT)]


def coded_bytes(codec: Codec, elements: int, world: int) -> int:
    """What each rank sends: for each segment, a payload to each other rank, twice."""
    sizes = [codec.payload_bytes(slice_size(len(cut), world)) for cut in segments(elements)]
    return 2 * (world - 1) * sum(sizes)


def raw_bytes(elements: int, world: int) -> int:
    return 2 * (world - 1) * 4 * slice_size(elements, world)


class Keeper(Protocol):
    def state(self) -> dict[str, Tensor]:
        """What is carried from step to step, by name: views, not copies."""


class Reduction(Keeper, Protocol):
    """The sum over ranks of vectors of one size, and what is kept from one to the next."""

    def steps(self, flat: Tensor, divisor: Divisor) -> Steps:
        """flat [elements] float32 becomes the sum over all ranks over the divisor, the same bits on every rank."""


class CodedReduction:
    """Each peer's slice is compressed, the sum in rank order is float32, and the owner compresses it for all.

    Both roundings are fed back into the next step (Tang et al., 2019: DoubleSqueeze): ``worker`` [elements] is what
    this rank has not yet told the owners, ``server`` [own slice] what it has not yet told everybody as an owner. Its
    own slice a rank adds as it is."""

    def __init__(self, codec: Codec, elements: int, links: Links, device: torch.device, *, feedback: bool) -> None:
        self._codec, self._links = codec, links
        self._slices = slices(elements, links.world)
        self._own = self._slices[links.rank]
        size = codec.payload_bytes(slice_size(elements, links.world))
        self._scatter = links.scatter_rows(size)
        self._gather = links.gather_rows(size)
        self._total = torch.zeros(len(self._own), device=device)
        self.worker = torch.zeros(elements, device=device) if feedback else None
        self.server = torch.zeros(len(self._own), device=device) if feedback else None

    @torch.no_grad()
    def steps(self, flat: Tensor, divisor: Divisor) -> Steps:
        me, codec, own = self._links.rank, self._codec, self._own
        if self._links.world == 1:
            flat.div_(divisor())
            return
        rows, arrived = self._scatter
        for rank, cut in enumerate(self._slices):
            if rank != me:
                error = self.worker[cut.start : cut.stop] if self.worker is not None else None
                codec.compress(flat[cut.start : cut.stop], error, self._payload(rows[rank], cut))
        yield self._links.all_to_all(0, self._scatter)
        mine = flat[own.start : own.stop]
        if self.worker is not None:
            # exact where it has always been this rank's slice; a part that came from another split is told now
            mine += self.worker[own.start : own.stop]
            self.worker[own.start : own.stop] = 0.0
        rank_order_sum(codec, [self._payload(row, own) for row in arrived], mine, me, self._total)
        by = divisor()
        if by != 1.0:
            self._total.div_(by)
        codec.compress(self._total, self.server, self._payload(self._gather[0], own))
        yield self._links.all_gather(1, self._gather)
        for rank, cut in enumerate(self._slices):
            codec.restore(self._payload(self._gather[1][rank], cut), flat[cut.start : cut.stop])

    def _payload(self, row: Tensor, cut: range) -> Tensor:
        return row[: self._codec.payload_bytes(len(cut))]

    def state(self) -> dict[str, Tensor]:
        return {"worker": self.worker, "server": self.server} if self.worker is not None else {}  # type: ignore[dict-item]


class ScatterReduction:
    """A compressed reduce-scatter: what `CodedReduction` does up to the owners' sums."""

    def __init__(self, codec: Codec, elements: int, links: Links, device: torch.device, *, feedback: bool) -> None:
        """``elements``: of the whole vector, a multiple of the ranks."""
        self._codec, self._links, self._own = codec, links, elements // links.world
        self._scatter = links.scatter_rows(codec.payload_bytes(self._own))
        self.worker = torch.zeros(elements, device=device) if feedback else None

    @torch.no_grad()
    def steps(self, flat: Tensor, out: Tensor, by: float) -> Steps:
        """flat [elements] float32 -> out [elements / ranks]: this rank's slice of the sum over ranks, over ``by``."""
        pieces = flat.view(self._links.world, self._own)
        rows, arrived = self._scatter
        for rank, piece in enumerate(pieces):
            if rank != self._links.rank:
                start = rank * self._own
                error = self.worker[start : start + self._own] if self.worker is not None else None
                self._codec.compress(piece, error, rows[rank])
        yield self._links.all_to_all(0, self._scatter)
        total = torch.empty_like(pieces[0])
        rank_order_sum(self._codec, list(arrived), pieces[self._links.rank], self._links.rank, total)
        out.copy_(total.div_(by) if by != 1.0 else total)

    def state(self) -> dict[str, Tensor]:
        return {"worker": self.worker} if self.worker is not None else {}


def rank_order_sum(codec: Codec, payloads: Sequence[Tensor], own: Tensor, me: int, total: Tensor) -> None:
    """total = numbers of rank 0 + those of rank 1 + ...; those of ``me`` are ``own``, the others' compressed."""
    for rank, payload in enumerate(payloads):
        if rank == me:
            total.copy_(own) if rank == 0 else total.add_(own)
        elif rank == 0:
            codec.restore(payload, total)
        else:
            codec.add(payload, total)


class RawReduction:
    """Uncompressed, in the same transfers: summed in rank order by each slice's owner."""

    def __init__(self, elements: int, links: Links, device: torch.device, first_stage: int = 0) -> None:
        self._links, self._elements, self._first = links, elements, first_stage
        self._size = slice_size(elements, links.world)
        self._scatter = links.scatter_rows(4 * self._size)
        self._gather = links.gather_rows(4 * self._size)

    @torch.no_grad()
    def steps(self, flat: Tensor, divisor: Divisor) -> Steps:
        if self._links.world == 1:
            flat.div_(divisor())
            return
        if not self._elements:
            return
        rows, arrived = (_numbers(rows) for rows in self._scatter)
        rows.view(-1)[: self._elements] = flat
        yield self._links.all_to_all(self._first, self._scatter)
        operands = [rows[rank] if rank == self._links.rank else arrived[rank] for rank in range(self._links.world)]
        total = _numbers(self._gather[0])
        total.copy_(operands[0])
        for operand in operands[1:]:
            total.add_(operand)
        by = divisor()
        if by != 1.0:
            total.div_(by)
        yield self._links.all_gather(self._first + 1, self._gather)
        flat.copy_(_numbers(self._gather[1]).view(-1)[: self._elements])

    def state(self) -> dict[str, Tensor]:
        return {}


def _numbers(rows: Tensor) -> Tensor:
    return rows.view(torch.float32)


def load(reduction: Keeper, state: Mapping[str, Tensor], what: str) -> None:
    """Take over what `state` gave. Raises UserError where it is of another size or codec."""
    own = reduction.state()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
        here, there = ({k: list(v.shape) for k, v in s.items()} for s in (own, state))
        raise UserError(
            f"the saved errors of {what} are {there}, here they are {here}: use the same compressor and ranks."
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


class Division:
    """A vector in parts, each a reduction of its own."""

    def __init__(self, parts: Sequence[tuple[range, Reduction]]) -> None:
        self.parts = tuple(parts)

    def start(self, line: "Line", flat: Tensor, divisor: Divisor, ended: Callable[[], None] = lambda: None) -> None:
        """Put the parts on a line; ``ended`` is called when the last one is done."""
        left = len(self.parts)

        def done() -> None:
            nonlocal left
            left -= 1
            if not left:
                ended()

        for cut, reduction in self.parts:
            line.start(reduction.steps(flat[cut.start : cut.stop], divisor), done)
            line.advance()

    def state(self) -> dict[str, Tensor]:
        return {f"{i}/{k}": v for i, (_, part) in enumerate(self.parts) for k, v in part.state().items()}


# --- running them ---------------------------------------------------------------------------------------------------


def drain(steps: Steps) -> None:
    """Run one reduction to its end."""
    for handle in steps:
        handle.wait()


@dataclass
class _Running:
    steps: Steps
    handle: Handle | None  # None: ended
    stage: int
    ended: Callable[[], None]


class Line:
    """Reductions side by side, all started in the same order on every rank, each going on as its transfers come.

    Transfers of one stage are started in the line's order. Where the links' stages are not independent, nothing but
    first stages is started before `finish`, so that all ranks start all transfers in the same order."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._running: list[_Running] = []

    def start(self, steps: Steps, ended: Callable[[], None] = lambda: None) -> None:
        self._running.append(_Running(steps, next(steps, None), 0, ended))
        if self._running[-1].handle is None:
            ended()

    def advance(self) -> None:
        """Go on with what has come, without waiting."""
        if self._links.independent:
            for stage in range(MOST_STAGES):
                self._pass(stage, wait=False)

    def finish(self) -> None:
        """Wait until all have ended."""
        try:
            for stage in range(MOST_STAGES):
                self._pass(stage, wait=True)
        finally:
            self._running = []

    def _pass(self, stage: int, *, wait: bool) -> None:
        for running in self._running:
            if running.handle is None or running.stage > stage:
                continue
            if running.stage < stage or (not wait and not running.handle.is_completed()):
                return  # those behind it must not overtake
            running.handle.wait()
            running.handle = next(running.steps, None)
            running.stage += 1
            if running.handle is None:
                running.ended()
