"""Ring attention: exact attention over a sequence of which each worker holds a slice (Liu et al., 2023).

Queries stay; keys and values go from worker to worker, and each block is added to a running softmax. The backward pass
goes round once more and sends the gradients of keys and values along with them, until they are home again. No worker
ever holds more than two blocks of keys, or scores of more than ``COLUMNS`` keys at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.comm.group import Group
from shoal.comm.stages import StageMessages, make_messages
from shoal.comm.tensors import Collectives, make_collectives
from shoal.errors import UserError
from shoal.parallel.context.slices import SEQUENCE, contiguous, places, zigzag
from shoal.parallel.layout.split import Split

COLUMNS = 128  # keys whose scores are held at a time: memory grows with the queries alone
_KINDS = ("block", "gradients")  # what goes round


@dataclass
class Ring:
    """The workers that share each sequence, and how the present one is cut."""

    collectives: Collectives
    messages: StageMessages | None  # sends do not wait for the receiver; None for one worker
    causal: bool  # later places have more to do: cut in zigzag
    slices: Split

    @staticmethod
    def of(group: Group, causal: bool, device: torch.device | None = None) -> "Ring":
        """Called by all workers of the group."""
        messages = make_messages(group, device or torch.device("cpu")) if group.world > 1 else None
        return Ring(make_collectives(group), messages, causal, contiguous(0, group.world))

    @property
    def rank(self) -> int:
        return self.collectives.rank

    @property
    def world(self) -> int:
        return self.collectives.world

    def pass_on(self, hop: int, what: str, t: Tensor) -> None:
        """To the next worker. The tensor must not be written to afterwards."""
        if self.messages is not None:
            self.messages.send((self.rank + 1) % self.world, (hop, _KINDS.index(what)), {what: t})

    def take(self, hop: int, what: str) -> Tensor:
        """From the worker before. The tensor must not be written to."""
        assert self.messages is not None
        taken: Tensor = self.messages.receive((self.rank - 1) % self.world, (hop, _KINDS.index(what)))[what]
        return taken

    def cut(self, length: int) -> None:
        """From now on sequences have this many places."""
        if self.slices.full != length:
            self.slices = (zigzag if self.causal else contiguous)(length, self.collectives.world)

    def own(self, t: Tensor, dim: int = SEQUENCE) -> Tensor:
        """This worker's part of a tensor with whole sequences along ``dim``."""
        return self.slices.along(dim).take(t, self.rank)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
    ) -> Tensor:
        """As shoal.models.attention, of own places: q, k, v [n, heads, T of this rank, d].

        ``mask`` bool [n, 1, 1, T] covers the keys of the whole sequence. A row that sees no key gives zeros.
        Raises UserError for dropout, whose mask would be T x T."""
        if dropout:
            raise UserError("attention over a split sequence has no dropout: set model.attention_dropout = 0.")
        mixed: Tensor = _RingAttention.apply(q, k, v, mask, causal, self)  # type: ignore[no-untyped-call]
        return mixed


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, ring: Ring) -> Tensor:
        pieces = _Pieces(ring, causal, mask)
        wide = _wide(q)
        top = wide.new_full((*q.shape[:-1], 1), -torch.inf)  # the largest score of each row so far
        total, mixed = torch.zeros_like(top), wide.new_zeros((*q.shape[:-1], v.shape[-1]))
        for _, owner, (keys, values) in _go_round(ring, _stack(k, v)):
            for rows, columns, hidden in pieces.of(owner):
                scores = _scores(q[:, :, rows], keys[:, :, columns], hidden)
                before = top[:, :, rows]
                higher = torch.maximum(before, scores.amax(-1, keepdim=True))
                base = higher.masked_fill(higher == -torch.inf, 0.0)  # rows that have seen nothing yet
                shrink = (before - base).exp_()
                weights = scores.sub_(base).exp_()
                total[:, :, rows].mul_(shrink).add_(weights.sum(-1, keepdim=True))
                mixed[:, :, rows].mul_(shrink).add_(weights.to(v.dtype) @ values[:, :, columns])
                before.copy_(higher)
        seen = total > 0
        mixed.div_(total.masked_fill(~seen, 1.0))
        log_total = torch.where(seen, top + total.log(), torch.inf)  # of exp(scores): exp(score - inf) is no weight
        out = mixed.to(v.dtype)
        context.save_for_backward(q, k, v, out, log_total)
        context.ring, context.pieces = ring, pieces
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_total = context.saved_tensors
        grad = gradients[0]
        wide = _wide(q)
        scale = q.shape[-1] ** -0.5
        dq = torch.zeros_like(wide)
        drop = (_wide(grad) * _wide(out)).sum(-1, keepdim=True)  # what the softmax's own gradient takes off
        ring: Ring = context.ring
        for hop, owner, (keys, values) in _go_round(ring, _stack(k, v)):
            found = wide.new_zeros((2, *keys.shape))  # dk and dv of this block, as far as own queries go
            for rows, columns, hidden in context.pieces.of(owner):
                some, mine, toward = keys[:, :, columns], q[:, :, rows], grad[:, :, rows]
                weights = _scores(mine, some, hidden).sub_(log_total[:, :, rows]).exp_()
                found[1][:, :, columns] += weights.to(v.dtype).transpose(-1, -2) @ toward
                pull = _wide(toward @ values[:, :, columns].transpose(-1, -2)).sub_(drop[:, :, rows])
                pull = pull.mul_(weights).mul_(scale).to(q.dtype)
                dq[:, :, rows] += pull @ some
                found[0][:, :, columns] += pull.transpose(-1, -2) @ mine
            # what those before have found comes with the block, and goes on with it until it is home
            ring.pass_on(hop, "gradients", found if hop == 0 else ring.take(hop - 1, "gradients") + found)
        dk, dv = (found if ring.world == 1 else ring.take(ring.world - 1, "gradients")).to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None


@dataclass
class _Pieces:
    """What of each block is computed, for the cut and the mask that the forward pass had."""

    ring: Ring
    causal: bool
    mask: Tensor | None

    def __post_init__(self) -> None:
        self.slices = self.ring.slices
        self.own = places(self.slices, self.ring.rank)

    def of(self, owner: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """(own rows, columns of the owner's block, which of their scores are hidden: bool, broadcast to [n, heads,
        rows, columns]). Rows and columns that cannot see each other are left out."""
        start = 0
        for begin, end in self.slices.kept[owner]:
            for first in range(begin, end, COLUMNS):
                at = torch.arange(first, min(first + COLUMNS, end))
                columns = slice(start, start + len(at))
                start += len(at)
                rows, hidden = slice(0, len(self.own)), None
                if self.causal:
                    rows = slice(int((self.own < first).sum()), len(self.own))  # own places ascend
                    late = at > self.own[rows, None]
                    hidden = late if bool(late.any()) else None
                if self.mask is not None:
                    padding = ~self.mask[..., at]
                    hidden = padding if hidden is None else hidden | padding
                if rows.start < rows.stop:
                    yield rows, columns, hidden


def _go_round(ring: Ring, block: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(hop, owner, keys and values [2, n, heads, T of the owner, d]), the own first; each goes on before it is used."""
    for hop in range(ring.world):
        if hop:
            block = ring.take(hop - 1, "block")
        if hop < ring.world - 1:
            ring.pass_on(hop, "block", block)
        yield hop, (ring.rank - hop) % ring.world, block


def _stack(k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([k.detach(), v.detach()])


def _wide(t: Tensor) -> Tensor:
    """At least float32: the running sums are never in 16 bits."""
    return t if t.dtype == torch.float64 else t.float()


def _scores(q: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
    scores: Tensor = _wide(q @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
